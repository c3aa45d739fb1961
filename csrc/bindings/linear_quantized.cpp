// Linear layers on weights of 8 and 4 bits, and what reads and writes those weights.
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <vector>

#include "../streams.h"
#include "experts.h"
#include "matrix.h"

namespace hasten {
namespace {

void check_shape(const Stream& s) {
    if (s.group != 0 && s.group != 32 && s.group != 64 && s.group != 128)
        fail("groups of an int4 weight have 32, 64 or 128 inputs, not " + text(s.group));
    if (s.n < 0 || s.k < 1 || (s.group ? s.k % s.group : s.k > int64_t(1) << 17) ||
        (s.gated && s.n % 2))
        fail("w cannot have " + text(s.n) + " outputs of " + text(s.k) + " inputs");
}

// A weight and what it is made of; group 0: int8.
Stream stream(nb::handle data_, int64_t n, int64_t k, int64_t group, bool asymmetric, bool gated) {
    Tensor data("w", data_);
    data.is(Type::u8).has_dims(1).contiguous();
    const Stream s{data.as<uint8_t>(), n, k, group, asymmetric, gated};
    check_shape(s);
    if (s.bytes() != data.size())
        data.fail("has " + text(data.size()) + " bytes, not " + text(s.bytes()));
    return s;
}

QuantizedArgs args(const Stream& w) { return {w.n, w.k, w.group, w.asymmetric}; }

Weights<QuantizedArgs> weights(const Stream& w) { return {args(w), w.data, w.bytes()}; }

Matrix matrix(nb::object w, int64_t n, int64_t k, int64_t group, bool asymmetric) {
    return {weights(stream(w, n, k, group, asymmetric, false)), w};
}

void linear_quantized(nb::handle x, nb::handle w, int64_t n, int64_t k, int64_t group,
                      bool asymmetric, nb::handle bias, nb::handle add, nb::handle out) {
    launch_linear(weights(stream(w, n, k, group, asymmetric, false)), x, bias, add, out);
}

void linear_quantized_gated(nb::handle x, nb::handle w, int64_t n, int64_t k, int64_t group,
                            bool asymmetric, nb::handle bias, const std::string& kind,
                            nb::handle out) {
    launch_gated(weights(stream(w, n, k, group, asymmetric, true)), kind, x, bias, out);
}

void linear_quantized_experts(nb::handle x_, const TensorList& weights, int64_t n, int64_t k,
                              int64_t group, bool asymmetric, nb::handle kind_, nb::handle offsets_,
                              nb::handle out_) {
    const bool gated = !kind_.is_none();
    const Stream w{nullptr, n, k, group, asymmetric, gated};
    check_shape(w);
    if (weights.type() != Type::u8 || weights.shape() != std::vector{w.bytes()})
        fail("the experts' weights are not [" + text(n) + ", " + text(k) + "] in " +
             text(w.bytes()) + " bytes");
    QuantizedArgs a = args(w);
    if (gated) a.gate = gate_of(nb::cast<std::string>(kind_));
    const ExpertRows rows(x_, weights, k, offsets_, gated ? n / 2 : n, out_);
    a.x_stride = rows.x_stride, a.out_stride = rows.out_stride;
    launch("linear_experts", rows.most_weights() * w.bytes(), [a, rows] {
        const std::vector<LinearPart> parts = rows.parts();
        run(a, parts.data(), int64_t(parts.size()));
    });
}

void put_int8_(nb::handle w_, int64_t n, int64_t k, bool gated, int64_t first, nb::handle codes_,
               nb::handle scale_) {
    const Stream w = stream(w_, n, k, 0, false, gated);
    Tensor codes("codes", codes_), scale("scale", scale_);
    codes.is(Type::i8).has_shape({-1, k}).contiguous(1);
    const int64_t rows = codes.shape(0);
    scale.is(Type::f32).has_shape({rows}).contiguous();
    if (first < 0 || first + rows > n) fail("rows from " + text(first) + " on are not in w");
    nb::gil_scoped_release release;
    put_int8(w, first, rows, codes.as<int8_t>(), codes.stride(0), scale.floats());
}

void put_int4_(nb::handle w_, int64_t n, int64_t k, int64_t group, bool gated, int64_t first,
               nb::handle codes_, nb::handle scale_, nb::handle zero_) {
    if (!group) fail("an int4 weight has groups");
    const Stream w = stream(w_, n, k, group, !zero_.is_none(), gated);
    Tensor codes("codes", codes_), scale("scale", scale_);
    codes.is(Type::u8).has_shape({-1, k}).contiguous(1);
    const int64_t rows = codes.shape(0);
    scale.is(Type::f16).has_shape({rows, k / group}).contiguous();
    const uint8_t* zero = nullptr;
    if (w.asymmetric)
        zero = Tensor("zero", zero_).is(Type::u8).has_shape({rows, k / group}).contiguous()
                   .as<uint8_t>();
    if (first < 0 || first + rows > n) fail("rows from " + text(first) + " on are not in w");
    nb::gil_scoped_release release;
    put_int4(w, first, rows, codes.as<uint8_t>(), codes.stride(0), scale.as<uint16_t>(), zero);
}

void unpack_quantized(nb::handle w_, int64_t n, int64_t k, int64_t group, bool asymmetric, bool gated,
            nb::handle out_) {
    const Stream w = stream(w_, n, k, group, asymmetric, gated);
    Tensor out("out", out_);
    out.is(Type::f32).has_shape({n, k}).contiguous();
    nb::gil_scoped_release release;
    dequantize(w, nullptr, n, out.floats());
}

void embed_quantized(nb::handle ids_, nb::handle w_, int64_t n, int64_t k, int64_t group, bool asymmetric,
           nb::handle out_) {
    const Stream w = stream(w_, n, k, group, asymmetric, false);
    Tensor ids("ids", ids_), out("out", out_);
    ids.is(Type::i64).has_dims(1).contiguous();
    out.is(Type::f32).has_shape({ids.shape(0), k}).contiguous();
    const int64_t rows = ids.shape(0), *id = ids.as<int64_t>();
    float* to = out.floats();
    launch("embed", rows * w.bytes() / (n ? n : 1), [w, rows, id, to] {
        for (int64_t i = 0; i < rows; i++)
            if (id[i] < 0 || id[i] >= w.n)
                throw std::out_of_range("ids[" + text(i) + "] is " + text(id[i]) +
                                        ", but the table has " + text(w.n) + " rows");
        dequantize(w, id, rows, to);
    });
}

}  // namespace

void bind_linear_quantized(nb::module_& m) {
    using namespace nanobind::literals;
    m.def("matrix_quantized", &matrix, "w"_a, "n"_a, "k"_a, "group"_a, "asymmetric"_a);
    m.def("linear_quantized", &linear_quantized, "x"_a, "w"_a, "n"_a, "k"_a, "group"_a, "asymmetric"_a,
          "bias"_a.none(), "add"_a.none(), "out"_a);
    m.def("linear_quantized_gated", &linear_quantized_gated, "x"_a, "w"_a, "n"_a, "k"_a, "group"_a,
          "asymmetric"_a, "bias"_a.none(), "kind"_a, "out"_a);
    m.def("linear_quantized_experts", &linear_quantized_experts, "x"_a, "weights"_a, "n"_a, "k"_a,
          "group"_a, "asymmetric"_a, "kind"_a.none(), "offsets"_a, "out"_a);
    m.def("put_int8", &put_int8_, "w"_a, "n"_a, "k"_a, "gated"_a, "first"_a, "codes"_a, "scale"_a);
    m.def("put_int4", &put_int4_, "w"_a, "n"_a, "k"_a, "group"_a, "gated"_a, "first"_a, "codes"_a,
          "scale"_a, "zero"_a.none());
    m.def("unpack_quantized", &unpack_quantized, "w"_a, "n"_a, "k"_a, "group"_a, "asymmetric"_a, "gated"_a,
          "out"_a);
    m.def("embed_quantized", &embed_quantized, "ids"_a, "w"_a, "n"_a, "k"_a, "group"_a, "asymmetric"_a,
          "out"_a);
}

}  // namespace hasten
