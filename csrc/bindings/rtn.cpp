// Weights rounded to the nearest code.
#include "bindings.h"

namespace hasten {
namespace {

void rtn(nb::handle x_, int64_t group, nb::handle clips_, nb::handle codes_, nb::handle scale_,
         nb::handle zero_) {
    Tensor x("values", x_), clips("clips", clips_), codes("codes", codes_), scale("scale", scale_);
    x.has_dims(2).contiguous(1);
    if (x.type() != Type::f32 && x.type() != Type::bf16)
        x.fail_type(std::string("is ") + type_name(x.type()) + ", not float32 or bfloat16");
    const int64_t rows = x.shape(0), k = x.shape(1);
    if (k < 1 || group < 0 || group % 16 || (group && k % group))
        fail("values have " + text(k) + " inputs, no whole number of groups of " + text(group));
    clips.is(Type::f32).has_dims(1).contiguous();
    RtnArgs a{};
    a.x = x.as<void>(), a.x_bf16 = x.type() == Type::bf16, a.x_stride = x.stride(0);
    a.rows = rows, a.k = k, a.group = group;
    a.clip = clips.floats(), a.clips = clips.shape(0);
    codes.is(group ? Type::u8 : Type::i8).has_shape({rows, k}).contiguous();
    if (group)
        scale.is(Type::f16).has_shape({rows, k / group}).contiguous();
    else
        scale.is(Type::f32).has_shape({rows}).contiguous();
    a.codes = codes.as<void>(), a.scale = scale.as<void>();
    if (!zero_.is_none()) {
        if (!group) fail("rows of 8 bits have no zeros");
        Tensor zero("zero", zero_);
        a.zero = zero.is(Type::u8).has_shape({rows, k / group}).contiguous().as<uint8_t>();
    }
    int bad = 0;
    a.bad = &bad;
    launch("rtn", 0, [a] { kernels().rtn(a); });
    if (bad) fail("a weight is infinite, not a number, or too large for a float16 scale");
}

}  // namespace

void bind_rtn(nb::module_& m) {
    m.def("rtn", rtn, nb::arg("values"), nb::arg("group"), nb::arg("clips"), nb::arg("codes"),
          nb::arg("scale"), nb::arg("zero").none());
}

}  // namespace hasten
