// Linear layers and what reads their packed weights.
#include "bindings.h"

namespace hasten {
namespace {

struct Packed {
    const void* data;
    bool bf16;
    int64_t n, k;
};

Packed packed(nb::handle object, int64_t n) {
    Tensor w("w", object);
    w.has_shape({(n + 15) / 16, -1, 16}).contiguous();
    if (w.type() != Type::f32 && w.type() != Type::bf16)
        w.fail_type(std::string("is ") + type_name(w.type()) + ", not float32 or bfloat16");
    return {w.as<void>(), w.type() == Type::bf16, n, w.shape(1)};
}

void linear(nb::handle x_, nb::handle w_, int64_t n, nb::handle bias_, nb::handle out_) {
    const Packed w = packed(w_, n);
    Tensor x("x", x_), out("out", out_);
    x.is(Type::f32).has_shape({-1, w.k}).contiguous(1);
    out.is(Type::f32).has_shape({x.shape(0), n}).contiguous(1);
    LinearArgs a{x.floats(), x.stride(0), x.shape(0), w.k, n, w.data, w.bf16, nullptr,
                 out.floats(), out.stride(0)};
    if (!bias_.is_none())
        a.bias = Tensor("bias", bias_).is(Type::f32).has_shape({n}).contiguous().floats();
    launch("linear", a.parts * (a.n + 15) / 16 * 16 * a.k * (a.w_bf16 ? 2 : 4), [a] { kernels().linear(a); });
}

void linear_grouped(nb::handle x_, nb::handle w_, int64_t n, nb::handle out_) {
    Tensor x("x", x_), w("w", w_), out("out", out_);
    w.has_shape({-1, (n + 15) / 16, -1, 16}).contiguous();
    if (w.type() != Type::f32 && w.type() != Type::bf16)
        w.fail_type(std::string("is ") + type_name(w.type()) + ", not float32 or bfloat16");
    const int64_t groups = w.shape(0), k = w.shape(2);
    x.is(Type::f32).has_shape({-1, groups, k}).contiguous(2);
    out.is(Type::f32).has_shape({x.shape(0), groups, n}).contiguous(2);
    LinearArgs a{x.floats(), x.stride(0), x.shape(0), k, n, w.as<void>(), w.type() == Type::bf16,
                 nullptr, out.floats(), out.stride(0)};
    a.parts = groups, a.x_part = x.stride(1), a.out_part = out.stride(1);
    launch("linear", a.parts * (a.n + 15) / 16 * 16 * a.k * (a.w_bf16 ? 2 : 4), [a] { kernels().linear(a); });
}

void pack_(nb::handle w_, nb::handle out_) {
    Tensor w("weight", w_), out("out", out_);
    w.has_dims(2).contiguous(1);
    Element element;
    switch (w.type()) {
        case Type::f32: element = Element::f32; break;
        case Type::bf16: element = Element::bf16; break;
        case Type::f16: element = Element::f16; break;
        default: w.fail_type(std::string("is ") + type_name(w.type()) + ", not a float type");
    }
    out.is(element == Element::bf16 ? Type::bf16 : Type::f32)
        .has_shape({(w.shape(0) + 15) / 16, w.shape(1), 16})
        .contiguous();
    nb::gil_scoped_release release;
    pack(w.as<void>(), element, w.stride(0), w.shape(0), w.shape(1), out.as<void>());
}

void unpack_(nb::handle w_, int64_t n, nb::handle out_) {
    const Packed w = packed(w_, n);
    Tensor out("out", out_);
    out.is(w.bf16 ? Type::bf16 : Type::f32).has_shape({n, w.k}).contiguous();
    nb::gil_scoped_release release;
    unpack(w.data, w.bf16, n, w.k, out.as<void>());
}

void embed_(nb::handle ids_, nb::handle w_, int64_t n, nb::handle out_) {
    const Packed w = packed(w_, n);
    Tensor ids("ids", ids_), out("out", out_);
    ids.is(Type::i64).has_dims(1).contiguous();
    out.is(Type::f32).has_shape({ids.shape(0), w.k}).contiguous();
    const int64_t* id = ids.as<int64_t>();
    launch("embed", 0, [=, rows = ids.shape(0), to = out.floats()] {
        for (int64_t i = 0; i < rows; i++)
            if (id[i] < 0 || id[i] >= n)
                throw std::out_of_range("ids[" + text(i) + "] is " + text(id[i]) +
                                        ", but the table has " + text(n) + " rows");
        embed(id, rows, w.data, w.bf16, w.k, to);
    });
}

}  // namespace

void bind_linear(nb::module_& m) {
    using namespace nanobind::literals;
    m.def("linear", &linear, "x"_a, "w"_a, "n"_a, "bias"_a.none(), "out"_a);
    m.def("linear_grouped", &linear_grouped, "x"_a, "w"_a, "n"_a, "out"_a);
    m.def("pack", &pack_, "weight"_a, "out"_a);
    m.def("unpack", &unpack_, "w"_a, "n"_a, "out"_a);
    m.def("embed", &embed_, "ids"_a, "w"_a, "n"_a, "out"_a);
}

}  // namespace hasten
