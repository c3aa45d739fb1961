// Linear layers and what reads their packed weights.
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <vector>

#include "experts.h"
#include "matrix.h"

namespace hasten {
namespace {

// a weight's numbers and what they are
struct Packed {
    const void* data;
    PackedShape shape;

    int64_t bytes() const { return shape.size() * (shape.bf16 ? 2 : 4); }
    Weights<LinearArgs> weights() const {
        return {{shape.n, shape.k, shape.bf16}, data, bytes()};
    }
};

bool is_bf16(const Tensor& w) {
    if (w.type() != Type::f32 && w.type() != Type::bf16)
        w.fail_type(std::string("is ") + type_name(w.type()) + ", not float32 or bfloat16");
    return w.type() == Type::bf16;
}

PackedShape shape_of(const Tensor& w, int64_t n, int64_t k, bool gated) {
    if (n < 0 || k < 0) fail("a weight has no [" + text(n) + ", " + text(k) + "] numbers");
    if (gated && n % 2) fail("a weight of " + text(n) + " outputs has no gate and up halves");
    return {n, k, is_bf16(w), gated};
}

Packed packed(nb::handle object, int64_t n, int64_t k, bool gated = false) {
    Tensor w("w", object);
    const PackedShape shape = shape_of(w, n, k, gated);
    w.has_shape({shape.size()}).contiguous();
    return {w.as<void>(), shape};
}

Matrix matrix(nb::object w, int64_t n, int64_t k) { return {packed(w, n, k).weights(), w}; }

void linear(nb::handle x, nb::handle w, int64_t n, int64_t k, nb::handle bias, nb::handle add,
            nb::handle out) {
    launch_linear(packed(w, n, k).weights(), x, bias, add, out);
}

void linear_gated(nb::handle x, nb::handle w, int64_t n, int64_t k, nb::handle bias,
                  const std::string& kind, nb::handle out) {
    launch_gated(packed(w, n, k, true).weights(), kind, x, bias, out);
}

void linear_grouped(nb::handle x_, nb::handle w_, int64_t n, int64_t k, nb::handle out_) {
    Tensor x("x", x_), w("w", w_), out("out", out_);
    const PackedShape shape = shape_of(w, n, k, false);
    w.has_shape({-1, shape.size()}).contiguous();
    const int64_t groups = w.shape(0), item = shape.bf16 ? 2 : 4;
    x.is(Type::f32).has_shape({-1, groups, k}).contiguous(2);
    out.is(Type::f32).has_shape({x.shape(0), groups, n}).contiguous(2);
    LinearArgs a{n, k, shape.bf16};
    a.x_stride = x.stride(0), a.out_stride = out.stride(0);
    std::vector<LinearPart> parts;
    for (int64_t g = 0; g < groups; g++)
        parts.push_back({x.floats() + g * x.stride(1), x.shape(0),
                         w.as<char>() + g * shape.size() * item, nullptr, nullptr,
                         out.floats() + g * out.stride(1)});
    launch("linear_grouped", groups * shape.size() * item,
           [a, parts] { kernels().linear(a, parts.data(), int64_t(parts.size())); });
}

// Row r goes through the weight e with offsets[e] <= r < offsets[e + 1].
void linear_experts(nb::handle x_, const TensorList& weights, int64_t n, int64_t k,
                    nb::handle kind_, nb::handle offsets_, nb::handle out_) {
    LinearArgs a{n, k, weights.type() == Type::bf16};
    if (!kind_.is_none()) a.gate = gate_of(nb::cast<std::string>(kind_));
    const bool gated = a.gate != Gate::none;
    const PackedShape shape{n, k, a.w_bf16, gated};
    if (n < 0 || k < 0 || (gated && n % 2) || weights.shape() != std::vector{shape.size()} ||
        (weights.type() != Type::f32 && weights.type() != Type::bf16))
        fail("the experts' weights are not float32 or bfloat16 [" + text(n) + ", " + text(k) + "]");
    const ExpertRows rows(x_, weights, k, offsets_, gated ? n / 2 : n, out_);
    a.x_stride = rows.x_stride, a.out_stride = rows.out_stride;
    launch("linear_experts", rows.most_weights() * shape.size() * (a.w_bf16 ? 2 : 4), [a, rows] {
        const std::vector<LinearPart> parts = rows.parts();
        kernels().linear(a, parts.data(), int64_t(parts.size()));
    });
}

void pack_(nb::handle rows_, int64_t first, int64_t n, bool gated, nb::handle out_) {
    Tensor rows("weight", rows_), out("out", out_);
    rows.has_dims(2).contiguous(1);
    Element element;
    switch (rows.type()) {
        case Type::f32: element = Element::f32; break;
        case Type::bf16: element = Element::bf16; break;
        case Type::f16: element = Element::f16; break;
        default: rows.fail_type(std::string("is ") + type_name(rows.type()) + ", not a float type");
    }
    const int64_t count = rows.shape(0);
    if (first < 0 || first + count > n)
        fail("rows " + text(first) + " to " + text(first + count) + " are not among " + text(n));
    out.is(element == Element::bf16 ? Type::bf16 : Type::f32);
    const PackedShape shape = shape_of(out, n, rows.shape(1), gated);
    out.has_shape({shape.size()}).contiguous();
    nb::gil_scoped_release release;
    pack(rows.as<void>(), element, rows.stride(0), first, count, shape, out.as<void>());
}

void unpack_(nb::handle w_, int64_t n, int64_t k, bool gated, nb::handle out_) {
    const Packed w = packed(w_, n, k, gated);
    Tensor out("out", out_);
    out.is(w.shape.bf16 ? Type::bf16 : Type::f32).has_shape({n, k}).contiguous();
    nb::gil_scoped_release release;
    unpack(w.data, w.shape, out.as<void>());
}

void embed_(nb::handle ids_, nb::handle w_, int64_t n, int64_t k, nb::handle out_) {
    const Packed w = packed(w_, n, k);
    Tensor ids("ids", ids_), out("out", out_);
    ids.is(Type::i64).has_dims(1).contiguous();
    out.is(Type::f32).has_shape({ids.shape(0), k}).contiguous();
    const int64_t rows = ids.shape(0), *id = ids.as<int64_t>();
    float* to = out.floats();
    launch("embed", rows * k * 4, [w, rows, id, n, to] {
        for (int64_t i = 0; i < rows; i++)
            if (id[i] < 0 || id[i] >= n)
                throw std::out_of_range("ids[" + text(i) + "] is " + text(id[i]) +
                                        ", but the table has " + text(n) + " rows");
        embed(id, rows, w.data, w.shape, to);
    });
}

}  // namespace

void bind_linear(nb::module_& m) {
    using namespace nanobind::literals;
    nb::class_<TensorList>(m, "TensorList").def(nb::init<nb::list>(), "tensors"_a);
    nb::class_<Matrix>(m, "Matrix");
    m.def("matrix", &matrix, "w"_a, "n"_a, "k"_a);
    m.def("linear", &linear, "x"_a, "w"_a, "n"_a, "k"_a, "bias"_a.none(), "add"_a.none(), "out"_a);
    m.def("linear_gated", &linear_gated, "x"_a, "w"_a, "n"_a, "k"_a, "bias"_a.none(), "kind"_a,
          "out"_a);
    m.def("linear_grouped", &linear_grouped, "x"_a, "w"_a, "n"_a, "k"_a, "out"_a);
    m.def("linear_experts", &linear_experts, "x"_a, "weights"_a, "n"_a, "k"_a, "kind"_a.none(),
          "offsets"_a, "out"_a);
    m.def("pack", &pack_, "rows"_a, "first"_a, "n"_a, "gated"_a, "out"_a);
    m.def("unpack", &unpack_, "w"_a, "n"_a, "k"_a, "gated"_a, "out"_a);
    m.def("embed", &embed_, "ids"_a, "w"_a, "n"_a, "k"_a, "out"_a);
}

}  // namespace hasten
