// What the bindings share. Each file of this folder checks arguments of some operations and calls
// them without the GIL.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "../kernels.h"
#include "../memory.h"
#include "../parallel.h"
#include "../tape.h"
#include "../tensor.h"

namespace hasten {

inline std::string text(int64_t x) { return std::to_string(x); }

// A ValueError; thrown inside of a launched call, too, where nobody holds the GIL.
[[noreturn]] inline void fail(const std::string& what) { throw std::invalid_argument(what); }

inline Gate gate_of(const std::string& kind) {
    if (kind == "silu") return Gate::silu;
    if (kind == "gelu_tanh") return Gate::gelu_tanh;
    fail("activation '" + kind + "' is neither silu nor gelu_tanh");
}

inline const float* optional_bias(nb::handle bias, int64_t n) {
    if (bias.is_none()) return nullptr;
    return Tensor("bias", bias).is(Type::f32).has_shape({n}).contiguous().floats();
}

// Runs an operation whose arguments have the right types and shapes. `call` holds them by value and
// checks what arrays of row numbers say, since a recorded call runs again when they say something
// else. `bytes` of weights, keys and values is what it reads from memory; a call that only then
// knows returns them.
template <class Call>
void launch(const char* name, int64_t bytes, const Call& call) {
    nb::gil_scoped_release release;
    Operation operation{name, bytes, [call]() -> int64_t {
        if constexpr (std::is_void_v<decltype(call())>) {
            call();
            return 0;
        } else {
            return call();
        }
    }};
    operation.run();
    if (Tape* tape = recording()) tape->operations.push_back(std::move(operation));
}

void bind_linear(nb::module_& m);
void bind_linear_blocks(nb::module_& m);
void bind_linear_quantized(nb::module_& m);
void bind_rows(nb::module_& m);
void bind_rtn(nb::module_& m);
void bind_pages(nb::module_& m);
void bind_trigrams(nb::module_& m);
void bind_suffixes(nb::module_& m);

}  // namespace hasten
