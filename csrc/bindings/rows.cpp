// Operations on rows of activations.
#include <nanobind/stl/string.h>

#include <cstring>

#include "bindings.h"

namespace hasten {
namespace {

// [..., size] with up to three dimensions as [outer, inner, size]
struct Rows {
    int64_t outer, inner, size, outer_stride, inner_stride;
};

Rows rows_of(Tensor& x) {
    if (x.ndim() < 1 || x.ndim() > 3) x.fail("has shape " + x.shape_text() + ", not 1 to 3 dimensions");
    const int last = x.ndim() - 1;
    x.is(Type::f32).contiguous(last);
    Rows r{1, 1, x.shape(last), 0, 0};
    if (last >= 1) r.inner = x.shape(last - 1), r.inner_stride = x.stride(last - 1);
    if (last >= 2) r.outer = x.shape(0), r.outer_stride = x.stride(0);
    return r;
}

void same_shape(Tensor& a, const Tensor& b) {
    bool same = a.ndim() == b.ndim();
    for (int i = 0; same && i < a.ndim(); i++) same = a.shape(i) == b.shape(i);
    if (!same) a.fail("has shape " + a.shape_text() + ", not " + b.shape_text());
}

void rms_norm(nb::handle x_, nb::handle residual_, nb::handle weight_, float eps, nb::handle add_,
              nb::handle out_, nb::handle sum_) {
    Tensor x("x", x_), weight("weight", weight_), out("out", out_);
    const Rows r = rows_of(x), o = rows_of(out);
    weight.is(Type::f32).has_shape({r.size}).contiguous();
    same_shape(out, x);
    NormArgs a{};
    a.x = x.floats(), a.x_outer = r.outer_stride, a.x_inner = r.inner_stride;
    a.weight = weight.floats(), a.eps = eps;
    a.outer = r.outer, a.inner = r.inner, a.size = r.size;
    a.out = out.floats(), a.out_outer = o.outer_stride, a.out_inner = o.inner_stride;
    if (!residual_.is_none()) {
        Tensor residual("residual", residual_), sum("sum", sum_);
        const Rows s = rows_of(residual);
        same_shape(residual, x);
        same_shape(sum.is(Type::f32).contiguous(), x);
        a.residual = residual.floats();
        a.residual_outer = s.outer_stride, a.residual_inner = s.inner_stride;
        a.sum = sum.floats();
    }
    if (!add_.is_none()) {
        Tensor add("add", add_);
        const Rows s = rows_of(add);
        same_shape(add, x);
        a.add = add.floats(), a.add_outer = s.outer_stride, a.add_inner = s.inner_stride;
    }
    launch("rms_norm", 0, [a] { kernels().rms_norm(a); });
}

void add(nb::handle x_, float factor, nb::handle y_, nb::handle out_) {
    Tensor x("x", x_), out("out", out_);
    const Rows r = rows_of(x), o = rows_of(out);
    same_shape(out, x);
    AddArgs a{};
    a.x = x.floats(), a.x_outer = r.outer_stride, a.x_inner = r.inner_stride, a.factor = factor;
    a.outer = r.outer, a.inner = r.inner, a.size = r.size;
    a.out = out.floats(), a.out_outer = o.outer_stride, a.out_inner = o.inner_stride;
    if (!y_.is_none()) {
        Tensor y("y", y_);
        const Rows s = rows_of(y);
        same_shape(y, x);
        a.y = y.floats(), a.y_outer = s.outer_stride, a.y_inner = s.inner_stride;
    }
    launch("add", 0, [a] { kernels().add(a); });
}

void take_rows(nb::handle x_, nb::handle index_, nb::handle out_) {
    Tensor x("x", x_), index("index", index_), out("out", out_);
    x.is(Type::f32).has_dims(2).contiguous(1);
    index.is(Type::i64).has_dims(1).contiguous();
    const int64_t rows = x.shape(0), size = x.shape(1), count = index.shape(0);
    const int64_t stride = x.stride(0);
    out.is(Type::f32).has_shape({count, size}).contiguous();
    launch("take_rows", 0, [=, x = x.floats(), row = index.as<int64_t>(), out = out.floats()] {
        for (int64_t i = 0; i < count; i++) {
            if (row[i] < 0 || row[i] >= rows)
                throw std::out_of_range("index[" + text(i) + "] is " + text(row[i]) +
                                        ", but there are " + text(rows) + " rows");
            std::memcpy(out + i * size, x + row[i] * stride, size_t(size) * sizeof(float));
        }
    });
}

void gated(nb::handle x_, const std::string& kind, nb::handle out_) {
    Tensor x("x", x_), out("out", out_);
    x.is(Type::f32).has_dims(2).contiguous(1);
    if (x.shape(1) % 2) x.fail("has an odd number of columns, not a gate and an up half");
    out.is(Type::f32).has_shape({x.shape(0), x.shape(1) / 2}).contiguous();
    GatedArgs a{x.floats(), x.stride(0), x.shape(0), x.shape(1) / 2, gate_of(kind), out.floats()};
    launch("gated", 0, [a] { kernels().gated(a); });
}

void softcap(nb::handle x_, float cap, nb::handle out_) {
    Tensor x("x", x_), out("out", out_);
    x.is(Type::f32).contiguous();
    same_shape(out.is(Type::f32).contiguous(), x);
    if (!(cap > 0.0f)) fail("the cap must be positive");
    const SoftcapArgs a{x.floats(), x.size(), cap, out.floats()};
    launch("softcap", 0, [a] { kernels().softcap(a); });
}

void row_top(nb::handle x_, nb::handle argmax_, nb::handle max_, nb::handle lse_,
             nb::handle ids_) {
    Tensor x("logits", x_), argmax("argmax", argmax_), max("max", max_), lse("lse", lse_);
    Tensor ids("ids", ids_);
    x.is(Type::f32).has_dims(2).contiguous(1);
    const int64_t rows = x.shape(0), size = x.shape(1);
    if (size < 1) x.fail("has no columns");
    if (size > INT32_MAX) x.fail("has more columns than a 32-bit id counts");
    argmax.is(Type::i64).has_shape({rows}).contiguous();
    max.is(Type::f32).has_shape({rows}).contiguous();
    lse.is(Type::f32).has_shape({rows}).contiguous();
    ids.is(Type::i64).has_shape({rows, -1}).contiguous();
    const int64_t k = ids.shape(1);
    if (k > size) fail("the first " + text(k) + " of " + text(size) + " columns were asked for");
    const RowTopArgs a{x.floats(),   x.stride(0),  rows, size, argmax.as<int64_t>(),
                       max.floats(), lse.floats(), k,    ids.as<int64_t>()};
    launch("row_top", 0, [a] { kernels().row_top(a); });
}

void sum_exp(nb::handle x_, nb::handle shift_, double temperature, nb::handle out_) {
    Tensor x("logits", x_), shift("shift", shift_), out("out", out_);
    x.is(Type::f32).has_dims(2).contiguous(1);
    const int64_t rows = x.shape(0);
    shift.is(Type::f32).has_shape({rows}).contiguous();
    out.is(Type::f64).has_shape({rows}).contiguous();
    if (!(temperature > 0)) fail("the temperature must be positive");
    const SumExpArgs a{x.floats(),     x.stride(0), rows,           x.shape(1),
                       shift.floats(), temperature, out.as<double>()};
    launch("sum_exp", 0, [a] { kernels().sum_exp(a); });
}

void route(nb::handle x_, int64_t top, bool normalize, nb::handle ids_, nb::handle weights_,
           int64_t groups, int64_t top_groups) {
    Tensor x("router_logits", x_), ids("ids", ids_), weights("weights", weights_);
    x.is(Type::f32).has_dims(2).contiguous(1);
    const int64_t experts = x.shape(1);
    if (groups < 1 || experts % groups || top_groups < 1 || top_groups > groups)
        fail("cannot choose " + text(top_groups) + " of " + text(groups) + " equal groups of " +
             text(experts) + " experts");
    const int64_t most = experts / groups * top_groups;
    if (top < 1 || top > most)
        fail("k is " + text(top) + ", but there are " + text(most) + " experts" +
             (groups > 1 ? " in the chosen groups" : ""));
    ids.is(Type::i32).has_shape({x.shape(0), top}).contiguous();
    weights.is(Type::f32).has_shape({x.shape(0), top}).contiguous();
    RouteArgs a{x.floats(), x.stride(0), x.shape(0), experts, top, normalize,
                ids.as<int32_t>(), weights.floats(), groups, top_groups};
    launch("route", 0, [a] { kernels().route(a); });
}

void group_rows(nb::handle ids_, int64_t experts, nb::handle offsets_, nb::handle order_,
                nb::handle slots_) {
    Tensor ids("ids", ids_), offsets("offsets", offsets_), order("order", order_);
    Tensor slots("slots", slots_);
    ids.is(Type::i32).has_dims(2).contiguous();
    const int64_t rows = ids.shape(0), top = ids.shape(1);
    if (experts < 0) fail("the number of experts is negative");
    offsets.is(Type::i64).has_shape({experts + 1}).contiguous();
    order.is(Type::i32).has_shape({rows * top}).contiguous();
    slots.is(Type::i32).has_shape({rows, top}).contiguous();
    const GroupArgs a{ids.as<int32_t>(), rows, top, experts, offsets.as<int64_t>(),
                      order.as<int32_t>(), slots.as<int32_t>()};
    launch("group_rows", 0, [a] { kernels().group_rows(a); });
}

void gather(nb::handle x_, nb::handle index_, nb::handle out_) {
    Tensor x("x", x_), index("index", index_), out("out", out_);
    x.is(Type::f32).has_dims(2).contiguous(1);
    index.is(Type::i32).has_dims(1).contiguous();
    out.is(Type::f32).has_shape({index.shape(0), x.shape(1)}).contiguous();
    const GatherArgs a{x.floats(), x.stride(0), x.shape(0), x.shape(1), index.as<int32_t>(),
                       index.shape(0), out.floats()};
    launch("gather", 0, [a] { kernels().gather(a); });
}

void combine(nb::handle y_, nb::handle slots_, nb::handle shares_, nb::handle add_,
             nb::handle out_) {
    Tensor y("y", y_), slots("slots", slots_), shares("shares", shares_), out("out", out_);
    slots.is(Type::i32).has_dims(2).contiguous();
    const int64_t rows = slots.shape(0), top = slots.shape(1);
    y.is(Type::f32).has_shape({rows * top, -1}).contiguous(1);
    shares.is(Type::f32).has_shape({rows, top}).contiguous();
    out.is(Type::f32).has_shape({rows, y.shape(1)}).contiguous();
    if (top < 1) slots.fail("has no choices");
    CombineArgs a{y.floats(), y.stride(0), rows, top, y.shape(1), slots.as<int32_t>(),
                  shares.floats(), nullptr, 0, out.floats()};
    if (!add_.is_none()) {
        Tensor add("add", add_);
        a.add = add.is(Type::f32).has_shape({rows, y.shape(1)}).contiguous(1).floats();
        a.add_stride = add.stride(0);
    }
    launch("combine", 0, [a] { kernels().combine(a); });
}

}  // namespace

void bind_rows(nb::module_& m) {
    using namespace nanobind::literals;
    m.def("rms_norm", &rms_norm, "x"_a, "residual"_a.none(), "weight"_a, "eps"_a,
          "add"_a.none(), "out"_a, "sum"_a.none());
    m.def("add", &add, "x"_a, "factor"_a, "y"_a.none(), "out"_a);
    m.def("take_rows", &take_rows, "x"_a, "index"_a, "out"_a);
    m.def("gated", &gated, "x"_a, "kind"_a, "out"_a);
    m.def("softcap", &softcap, "x"_a, "cap"_a, "out"_a);
    m.def("row_top", &row_top, "logits"_a, "argmax"_a, "max"_a, "lse"_a, "ids"_a);
    m.def("sum_exp", &sum_exp, "logits"_a, "shift"_a, "temperature"_a, "out"_a);
    m.def("group_rows", &group_rows, "ids"_a, "experts"_a, "offsets"_a, "order"_a, "slots"_a);
    m.def("gather", &gather, "x"_a, "index"_a, "out"_a);
    m.def("combine", &combine, "y"_a, "slots"_a, "shares"_a, "add"_a.none(), "out"_a);
    m.def("route", &route, "router_logits"_a, "k"_a, "normalize"_a, "ids"_a, "weights"_a,
          "groups"_a = 1, "top_groups"_a = 1);
}

}  // namespace hasten
