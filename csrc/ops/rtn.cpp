// Weights rounded to the nearest code. hasten.kernels.rtn.ref has the definition; sums of squared
// errors are kept in sixteen lanes (value i in lane i % 16) and added by the tree of `sum`, so that
// every instruction set makes the same choice.
#include "../half.h"
#include "ops.h"

namespace hasten {
namespace HASTEN_LEVEL {

namespace {

struct Range {
    float least, most;
    bool finite;
};

// Of values that are padded with zeros to whole vectors, which the range includes anyway.
HASTEN_INLINE Range range_of(const float* x, int64_t size) {
    F16 least = zero(), most = zero(), poison = zero();
    for (int64_t i = 0; i < size; i += LANES) {
        const F16 v = load(x + i);
        least = min(v, least), most = max(v, most);
        poison = fma(v, zero(), poison);  // NaN once a value is infinite or NaN
    }
    return {-max(zero() - least), max(most), is_nan(poison) == 0};
}

// Whole numbers next to v, halves to even, for |v| < 2^22.
HASTEN_INLINE F16 rounded(F16 v) {
    const F16 magic = splat(12582912.0f);
    return (v + magic) - magic;
}

struct Coder {
    F16 inverse, shift, low, high;
    Coder(float scale, float zero, float low, float high)
        : inverse(splat(scale == 0.0f ? 0.0f : 1.0f / scale)),
          shift(splat(zero)),
          low(splat(low)),
          high(splat(high)) {}
    HASTEN_INLINE F16 operator()(F16 v) const {
        return rounded(min(max(v * inverse + shift, low), high));
    }
};

HASTEN_INLINE float squared_error(const float* x, int64_t size, const Coder& code, float scale) {
    F16 total = zero();
    const F16 s = splat(scale);
    for (int64_t i = 0; i < size; i += LANES) {
        const F16 v = load(x + i);
        const F16 off = (code(v) - code.shift) * s - v;
        total = fma(off, off, total);
    }
    return sum(total);
}

template <class Code>
HASTEN_INLINE void put_codes(const float* x, int64_t size, const Coder& code, Code* out) {
    for (int64_t i = 0; i < size; i += LANES) {
        float codes[LANES];
        store(codes, code(load(x + i)));
        const int n = size - i < LANES ? int(size - i) : LANES;
        for (int j = 0; j < n; j++) out[i + j] = Code(int(codes[j]));
    }
}

// false if a value is not finite or a scale would not be
HASTEN_INLINE bool int8_row(const RtnArgs& a, const float* x, int64_t row) {
    const Range r = range_of(x, a.k);
    if (!r.finite) return false;
    const float amax = r.most > -r.least ? r.most : -r.least;
    float best = 0, least_error = -1;
    for (int64_t c = 0; c < a.clips; c++) {
        const float scale = amax < 0x1p-100f ? 0.0f : amax * (a.clip[c] / 127.0f);
        const float error = squared_error(x, a.k, Coder(scale, 0, -127, 127), scale);
        if (least_error < 0 || error < least_error) best = scale, least_error = error;
    }
    ((float*)a.scale)[row] = best;
    put_codes(x, a.k, Coder(best, 0, -127, 127), (int8_t*)a.codes + row * a.k);
    return true;
}

HASTEN_INLINE bool int4_group(const RtnArgs& a, const float* x, int64_t at) {
    const Range r = range_of(x, a.group);
    if (!r.finite) return false;
    const float largest = r.most >= -r.least ? r.most : r.least;
    float best = 0, best_zero = 8, least_error = -1;
    uint16_t best_half = 0;
    for (int64_t c = 0; c < a.clips; c++) {
        const float span =
            a.zero ? (r.most - r.least) * (a.clip[c] / 15.0f) : largest * (a.clip[c] / -8.0f);
        const uint16_t half = float_to_half(span);  // as it is stored
        const float scale = half_to_float(half);
        if (!(scale - scale == 0.0f)) return false;
        float zero = 8;
        if (a.zero) {
            zero = scale == 0.0f ? 0.0f : r.least * -a.clip[c] / scale;
            zero = (zero > 15.0f ? 15.0f : zero) + 12582912.0f - 12582912.0f;
        }
        const float error = squared_error(x, a.group, Coder(scale, zero, 0, 15), scale);
        if (least_error < 0 || error < least_error)
            best = scale, best_half = half, best_zero = zero, least_error = error;
    }
    ((uint16_t*)a.scale)[at] = best_half;
    if (a.zero) a.zero[at] = uint8_t(best_zero);
    put_codes(x, a.group, Coder(best, best_zero, 0, 15), (uint8_t*)a.codes + at * a.group);
    return true;
}

}  // namespace

void rtn(const RtnArgs& a) {
    const int64_t padded = (a.k + LANES - 1) / LANES * LANES, groups = a.group ? a.k / a.group : 1;
    parallel(a.rows, 1 + 4096 / a.k, a.rows * a.k * a.clips, [&](int64_t begin, int64_t end) {
        float* x = (float*)scratch(size_t(padded) * sizeof(float));
        for (int64_t i = a.k; i < padded; i++) x[i] = 0;
        for (int64_t row = begin; row < end; row++) {
            if (a.x_bf16) {
                const bf16* from = (const bf16*)a.x + row * a.x_stride;
                for (int64_t i = 0; i < a.k; i++) x[i] = widen(from[i]);
            } else {
                memcpy(x, (const float*)a.x + row * a.x_stride, size_t(a.k) * sizeof(float));
            }
            bool good = true;
            if (!a.group) good = int8_row(a, x, row);
            for (int64_t g = 0; a.group && g < groups; g++)
                good = int4_group(a, x + g * a.group, row * groups + g) && good;
            if (!good) __atomic_store_n(a.bad, 1, __ATOMIC_RELAXED);
        }
    });
}

}  // namespace HASTEN_LEVEL
}  // namespace hasten
