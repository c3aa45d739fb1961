// Linear layers on weights of 8 and 4 bits, and what reads and writes those weights.
#include "../streams.h"
#include "bindings.h"

namespace hasten {
namespace {

// A weight and what it is made of; group 0: int8.
Stream stream(nb::handle data_, int64_t n, int64_t k, int64_t group, bool asymmetric, bool gated) {
    Tensor data("w", data_);
    data.is(Type::u8).has_dims(1).contiguous();
    if (group != 0 && group != 32 && group != 64 && group != 128)
        fail("groups of an int4 weight have 32, 64 or 128 inputs, not " + text(group));
    if (n < 0 || k < 1 || (group && k % group) || k > int64_t(1) << 17 || (gated && n % 2))
        fail("w cannot have " + text(n) + " outputs of " + text(k) + " inputs");
    Stream s{data.as<uint8_t>(), n, k, group, asymmetric, gated};
    if (s.bytes() != data.size())
        data.fail("has " + text(data.size()) + " bytes, not " + text(s.bytes()));
    return s;
}

void linear_quantized(nb::handle x_, nb::handle w_, int64_t n, int64_t k, int64_t group, bool asymmetric,
            nb::handle bias_, nb::handle out_) {
    const Stream w = stream(w_, n, k, group, asymmetric, false);
    Tensor x("x", x_), out("out", out_);
    x.is(Type::f32).has_shape({-1, k}).contiguous(1);
    out.is(Type::f32).has_shape({x.shape(0), n}).contiguous(1);
    QuantizedArgs a{n, k, group, asymmetric};
    a.x_stride = x.stride(0), a.out_stride = out.stride(0);
    LinearPart part{x.floats(), x.shape(0), w.data, nullptr, nullptr, out.floats()};
    if (!bias_.is_none())
        part.bias = Tensor("bias", bias_).is(Type::f32).has_shape({n}).contiguous().floats();
    launch("linear", w.bytes(), [a, part] {
        (a.group ? kernels().linear_int4 : kernels().linear_int8)(a, &part, 1);
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
    for (int64_t i = 0; i < ids.shape(0); i++) {
        const int64_t id = ids.as<int64_t>()[i];
        if (id < 0 || id >= n)
            throw nb::index_error(("ids[" + text(i) + "] is " + text(id) + ", but the table has " +
                                   text(n) + " rows").c_str());
    }
    nb::gil_scoped_release release;
    dequantize(w, ids.as<int64_t>(), ids.shape(0), out.floats());
}

}  // namespace

void bind_linear_quantized(nb::module_& m) {
    using namespace nanobind::literals;
    m.def("linear_quantized", &linear_quantized, "x"_a, "w"_a, "n"_a, "k"_a, "group"_a, "asymmetric"_a,
          "bias"_a.none(), "out"_a);
    m.def("put_int8", &put_int8_, "w"_a, "n"_a, "k"_a, "gated"_a, "first"_a, "codes"_a, "scale"_a);
    m.def("put_int4", &put_int4_, "w"_a, "n"_a, "k"_a, "group"_a, "gated"_a, "first"_a, "codes"_a,
          "scale"_a, "zero"_a.none());
    m.def("unpack_quantized", &unpack_quantized, "w"_a, "n"_a, "k"_a, "group"_a, "asymmetric"_a, "gated"_a,
          "out"_a);
    m.def("embed_quantized", &embed_quantized, "ids"_a, "w"_a, "n"_a, "k"_a, "group"_a, "asymmetric"_a,
          "out"_a);
}

}  // namespace hasten
