// hasten._native: the module, and what it tells of the machine.
#include <nanobind/stl/string.h>

#include <cstdlib>

#include "bindings.h"

namespace hasten {
namespace {

void set_isa_(const std::string& name) {
    if (const char* problem = set_isa(name.c_str())) fail("HASTEN_ISA=" + name + ": " + problem);
}

void vector_math(nb::handle x_, bool tanh, nb::handle out_) {
    Tensor x("x", x_), out("out", out_);
    x.is(Type::f32).has_dims(1).contiguous();
    out.is(Type::f32).has_shape({x.shape(0)}).contiguous();
    kernels().vector_math(x.floats(), x.shape(0), tanh, out.floats());
}

double bandwidth(int64_t bytes, int repeats) {
    if (bytes < 1 || repeats < 1) fail("bytes and repeats must be positive");
    nb::gil_scoped_release release;
    return read_bandwidth(bytes, repeats);
}

}  // namespace
}  // namespace hasten

NB_MODULE(_native, m) {
    using namespace nanobind::literals;
    namespace h = hasten;
    namespace nb = nanobind;
    nb::set_leak_warnings(false);  // models may live until the process ends

    h::bind_linear(m);
    h::bind_linear_blocks(m);
    h::bind_linear_quantized(m);
    h::bind_rows(m);
    h::bind_rtn(m);
    h::bind_pages(m);
    h::bind_trigrams(m);
    h::bind_suffixes(m);
    m.def("vector_math", &h::vector_math, "x"_a, "tanh"_a, "out"_a);

    nb::class_<h::Tape>(m, "Tape")
        .def(nb::init<>())
        .def("__len__", [](const h::Tape& tape) { return tape.operations.size(); })
        .def("record", [](h::Tape& tape) {
            if (h::recording()) h::fail("this thread is recording already");
            if (!tape.operations.empty()) h::fail("the tape is full: record on a new one");
            h::recording() = &tape;
        })
        .def("stop", [](h::Tape& tape) {
            if (h::recording() == &tape) h::recording() = nullptr;
        })
        .def("replay", [](const h::Tape& tape) {
            if (h::recording()) h::fail("a tape cannot be replayed while one is recorded");
            nb::gil_scoped_release release;
            tape.replay();
        });
    m.def("set_profiling", &h::set_profiling, "on"_a);
    m.def("take_profile", [] {
        nb::dict result;
        for (const auto& [name, spent] : h::take_profile())
            result[name.c_str()] = nb::make_tuple(spent.calls, spent.seconds, spent.bytes);
        return result;
    });

    m.def("set_num_threads", [](int n) {
        if (n < 1) h::fail("the number of threads must be positive");
        h::set_num_threads(n);
    }, "threads"_a);
    m.def("get_num_threads", &h::num_threads);
    m.def("set_isa", &h::set_isa_, "name"_a);
    m.def("get_isa", [] { return std::string(h::isa()); });
    m.def("isa_supported", [](const std::string& name) { return h::isa_supported(name.c_str()); },
          "name"_a);
    m.def("read_bandwidth", &h::bandwidth, "bytes"_a = int64_t(256) << 20, "repeats"_a = 5);

    if (const char* wanted = std::getenv("HASTEN_ISA"))
        if (*wanted) h::set_isa_(wanted);
}
