// y[r, n] = fold over groups g of k, ascending, from 0: y = fma(float(sum), sx[r, g] * sw[n, g], y),
// then + bias, then + add; sum, an exact integer, is that of codes of x[r] * (code of w[n] - zero)
// over the inputs of the group.
#include "quantized.h"

namespace hasten {
namespace HASTEN_LEVEL {
namespace {

template <class D, bool ASYMMETRIC>
struct Int4 {
    typedef D Dot;

    static int64_t unit(const QuantizedArgs& a) { return a.group; }
    static int32_t factor(const QuantizedArgs&) { return ASYMMETRIC ? -1 : -8; }
    static int64_t block(const QuantizedArgs& a) { return a.group; }
    static int64_t unit_bytes(const QuantizedArgs& a) {
        return LANES * (a.group / 2 + 2 + ASYMMETRIC);
    }
    static int64_t tail_bytes(const QuantizedArgs&) { return 0; }

    template <int R, int P>
    static void tile(const Tile& t) {
        const int64_t group = t.args->group, step = t.width * 64;
        const int64_t scales_at = t.width * LANES * (group / 2) + t.panel * LANES * 2;
        const int64_t zeros_at = t.width * LANES * (group / 2 + 2) + t.panel * LANES;
        const int64_t unit_step = unit_bytes(*t.args) * t.width;
        const int64_t stride = t.x->stride, blocks = t.x->blocks;
        const int8_t* x = t.x->codes + t.row * stride + t.unit * group;
        const float* x_scale = t.x->scales + t.row * blocks + t.unit;
        const int32_t* x_sum = t.x->sums + t.row * blocks + t.unit;
        const uint8_t* w = t.w;  // the unit
        const int64_t units = t.units, first_codes = t.panel * 64;
        const uint8_t* ahead = t.ahead;
        float* held = (float*)t.held;
        F16 y[R][P];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int p = 0; p < P; p++)
                y[r][p] = t.first ? zero() : load(held + r * STRIP_OUTPUTS + p * LANES);
        for (int64_t i = 0; i < units; i++) {
            ahead = t.fetch(ahead);
            const uint8_t *codes = w + first_codes, *scales = w + scales_at, *zeros = w + zeros_at;
            I16 sum[R][P];
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                for (int p = 0; p < P; p++)
                    sum[r][p] = ASYMMETRIC ? times_bytes(x_sum + r * blocks, zeros + p * LANES)
                                           : splat(x_sum + r * blocks);
            for (int64_t from = 0; from < group; from += 32) {
                typename D::Sum part[R][P];
#pragma GCC unroll 8
                for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                    for (int p = 0; p < P; p++) part[r][p] = D::begin(sum[r][p]);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    typename D::Weights weights[P];
#pragma GCC unroll 4
                    for (int p = 0; p < P; p++) weights[p] = D::low(codes + p * 64);
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++) {
                        const typename D::Inputs inputs = D::inputs(x + r * stride + 8 * j);
#pragma GCC unroll 4
                        for (int p = 0; p < P; p++) D::add(part[r][p], weights[p], inputs);
                    }
#pragma GCC unroll 4
                    for (int p = 0; p < P; p++) weights[p] = D::high(codes + p * 64);
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++) {
                        const typename D::Inputs inputs = D::inputs(x + r * stride + 8 * j + 4);
#pragma GCC unroll 4
                        for (int p = 0; p < P; p++) D::add(part[r][p], weights[p], inputs);
                    }
                    codes += step;
                }
#pragma GCC unroll 8
                for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                    for (int p = 0; p < P; p++) D::end(sum[r][p], part[r][p]);
                x += 32;
            }
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) {
                const F16 scale = load_half((const uint16_t*)scales + p * LANES);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++)
                    y[r][p] = fma(to_float(sum[r][p]), splat(x_scale[r * blocks]) * scale, y[r][p]);
            }
            x_scale++, x_sum++;
            w += unit_step;
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) store(held + r * STRIP_OUTPUTS + p * LANES, y[r][p]);
    }

    static HASTEN_INLINE F16 result(const char* held, const uint8_t*, float) {
        return load((const float*)held);
    }
};

template <class D>
void linear_int4_with(const QuantizedArgs& a, const LinearPart* parts, int64_t count) {
    if (a.asymmetric)
        linear_quantized<Int4<D, true>>(a, parts, count);
    else
        linear_quantized<Int4<D, false>>(a, parts, count);
}

}  // namespace

void linear_int4(const QuantizedArgs& a, const LinearPart* parts, int64_t count) {
    linear_int4_with<NibbleDot>(a, parts, count);
}

#if defined(__AVX512F__)
void linear_int4_vnni(const QuantizedArgs& a, const LinearPart* parts, int64_t count) {
    linear_int4_with<NibbleDotVnni>(a, parts, count);
}
#endif

}  // namespace HASTEN_LEVEL
}  // namespace hasten
