// A weight of any kind that a linear layer multiplies by, and the layer's arguments.
#pragma once

#include <variant>

#include "bindings.h"

namespace hasten {

inline void run(const LinearArgs& a, const LinearPart* parts, int64_t count) {
    kernels().linear(a, parts, count);
}
inline void run(const QuantizedArgs& a, const LinearPart* parts, int64_t count) {
    (a.group ? kernels().linear_int4 : kernels().linear_int8)(a, parts, count);
}
inline void run(const BlocksArgs& a, const LinearPart* parts, int64_t count) {
    kernels().linear_blocks(a, parts, count);
}

// Weights [n, k] of which `Args` says the kind; bytes: their size in memory.
template <class Args>
struct Weights {
    Args args;
    const void* data;
    int64_t bytes;
};

// To Python: a checked weight, which stays in memory as long as this does.
struct Matrix {
    std::variant<Weights<LinearArgs>, Weights<QuantizedArgs>, Weights<BlocksArgs>> weights;
    nb::object owner;
};

// y = x w^T + bias + add
template <class Args>
void launch_linear(const Weights<Args>& w, nb::handle x_, nb::handle bias_, nb::handle add_,
                   nb::handle out_) {
    Args a = w.args;
    Tensor x("x", x_), out("out", out_);
    x.is(Type::f32).has_shape({-1, a.k}).contiguous(1);
    out.is(Type::f32).has_shape({x.shape(0), a.n}).contiguous(1);
    LinearPart part{x.floats(), x.shape(0), w.data, optional_bias(bias_, a.n), nullptr,
                    out.floats()};
    a.x_stride = x.stride(0), a.out_stride = out.stride(0);
    if (!add_.is_none()) {
        Tensor add("add", add_);
        part.add = add.is(Type::f32).has_shape({x.shape(0), a.n}).contiguous(1).floats();
        a.add_stride = add.stride(0);
    }
    launch("linear", w.bytes, [a, part] { run(a, &part, 1); });
}

// act(gate) * up of x w^T + bias = [gate | up]
template <class Args>
void launch_gated(const Weights<Args>& w, const std::string& kind, nb::handle x_, nb::handle bias_,
                  nb::handle out_) {
    Args a = w.args;
    Tensor x("x", x_), out("out", out_);
    x.is(Type::f32).has_shape({-1, a.k}).contiguous(1);
    out.is(Type::f32).has_shape({x.shape(0), a.n / 2}).contiguous(1);
    const LinearPart part{x.floats(), x.shape(0), w.data, optional_bias(bias_, a.n), nullptr,
                          out.floats()};
    a.gate = gate_of(kind);
    a.x_stride = x.stride(0), a.out_stride = out.stride(0);
    launch("linear_gated", w.bytes, [a, part] { run(a, &part, 1); });
}

}  // namespace hasten
