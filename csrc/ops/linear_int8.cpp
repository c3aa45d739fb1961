// y[r, n] = float(sum over k of codes of x[r] * codes of w[n]) * (scale of x[r] * scale of w[n]),
// then + bias, then + add. The sum is an exact 32-bit integer.
#include "int8.h"

namespace hasten {
namespace HASTEN_LEVEL {
namespace {

template <class D>
struct Int8 : Int8Stream {
    typedef D Dot;

    static int32_t factor(const QuantizedArgs&) { return D::FACTOR; }

    template <int R, int P>
    static void tile(const Tile& t) {
        I16 sum[R][P];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int p = 0; p < P; p++)
                sum[r][p] = t.first ? splat(t.x->sums + t.row + r)
                                    : load((const int32_t*)t.held + r * STRIP_OUTPUTS + p * LANES);
        const int64_t stride = t.x->stride, step = t.width * 64;
        const int8_t* x = t.x->codes + t.row * stride + t.unit * 4 * QUADS;
        const uint8_t* w = t.w + t.panel * 64;
        const uint8_t* ahead = t.ahead;
        for (int64_t i = 0; i < t.units; i++) {
            ahead = t.fetch(ahead);
#pragma GCC unroll 4
            for (int q = 0; q < QUADS; q++) {
                typename D::Weights weights[P];
#pragma GCC unroll 4
                for (int p = 0; p < P; p++) weights[p] = D::weights(w + p * 64);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) {
                    const typename D::Inputs inputs = D::inputs(x + r * stride + 4 * q);
#pragma GCC unroll 4
                    for (int p = 0; p < P; p++) D::add(sum[r][p], weights[p], inputs);
                }
                w += step;
            }
            x += 4 * QUADS;
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int p = 0; p < P; p++)
                store((int32_t*)t.held + r * STRIP_OUTPUTS + p * LANES, sum[r][p]);
    }
};

}  // namespace

void linear_int8(const QuantizedArgs& a, const LinearPart* parts, int64_t count) {
    linear_quantized<Int8<ByteDot>>(a, parts, count);
}

#if defined(__AVX512F__)
void linear_int8_vnni(const QuantizedArgs& a, const LinearPart* parts, int64_t count) {
    linear_quantized<Int8<ByteDotVnni>>(a, parts, count);
}
#endif

}  // namespace HASTEN_LEVEL
}  // namespace hasten
