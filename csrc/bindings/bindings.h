// What the bindings share. Each file of this folder checks arguments of some operations and calls
// them without the GIL.
#pragma once

#include <string>

#include "../kernels.h"
#include "../memory.h"
#include "../parallel.h"
#include "../tensor.h"

namespace hasten {

inline std::string text(int64_t x) { return std::to_string(x); }

[[noreturn]] inline void fail(const std::string& what) { throw nb::value_error(what.c_str()); }

inline Gate gate_of(const std::string& kind) {
    if (kind == "silu") return Gate::silu;
    if (kind == "gelu_tanh") return Gate::gelu_tanh;
    fail("activation '" + kind + "' is neither silu nor gelu_tanh");
}

inline const float* optional_bias(nb::handle bias, int64_t n) {
    if (bias.is_none()) return nullptr;
    return Tensor("bias", bias).is(Type::f32).has_shape({n}).contiguous().floats();
}

// Runs an operation whose arguments are checked. `call` holds them by value; `bytes` of weights,
// keys and values is what it reads from memory.
template <class Call>
void launch(const char* op, int64_t bytes, const Call& call) {
    (void)op, (void)bytes;
    nb::gil_scoped_release release;
    call();
}

void bind_linear(nb::module_& m);
void bind_linear_quantized(nb::module_& m);
void bind_rows(nb::module_& m);
void bind_pages(nb::module_& m);

}  // namespace hasten
