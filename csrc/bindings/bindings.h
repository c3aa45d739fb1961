// What the bindings share. Each file of this folder checks arguments of some operations and calls
// them without the GIL.
#pragma once

#include <stdexcept>
#include <string>

#include "../kernels.h"
#include "../memory.h"
#include "../parallel.h"
#include "../tensor.h"

namespace hasten {

inline std::string text(int64_t x) { return std::to_string(x); }

// A ValueError; thrown inside of a launched call, too, where nobody holds the GIL.
[[noreturn]] inline void fail(const std::string& what) { throw std::invalid_argument(what); }

// Runs an operation whose arguments have the right types and shapes. `call` holds them by value and
// checks what arrays of row numbers say, since it may run again when they say something else.
// `bytes` of weights, keys and values is what it reads from memory.
template <class Call>
void launch(const char* op, int64_t bytes, const Call& call) {
    (void)op, (void)bytes;
    nb::gil_scoped_release release;
    call();
}

void bind_linear(nb::module_& m);
void bind_rows(nb::module_& m);
void bind_pages(nb::module_& m);

}  // namespace hasten
