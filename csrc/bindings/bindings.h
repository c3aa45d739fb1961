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

// Runs an operation whose arguments are checked. `call` holds them by value; `bytes` of weights,
// keys and values is what it reads from memory.
template <class Call>
void launch(const char* op, int64_t bytes, const Call& call) {
    (void)op, (void)bytes;
    nb::gil_scoped_release release;
    call();
}

void bind_linear(nb::module_& m);
void bind_linear_blocks(nb::module_& m);
void bind_rows(nb::module_& m);
void bind_pages(nb::module_& m);

}  // namespace hasten
