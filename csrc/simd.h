// F16: sixteen floats, the only vector type of the kernels.
//
// One operation of F16 is sixteen independent IEEE operations, so a kernel written with it gives
// the same bits on every instruction set. Sums over the lanes use one fixed tree.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define HASTEN_INLINE inline __attribute__((always_inline))

namespace hasten {
namespace HASTEN_LEVEL {

constexpr int LANES = 16;
typedef uint16_t bf16;  // the upper half of a float

// bit i of the result of first_lanes(n) is set for i < n
HASTEN_INLINE uint32_t first_lanes(int n) { return n >= LANES ? 0xffffu : (1u << n) - 1; }

HASTEN_INLINE float widen(float x) { return x; }
HASTEN_INLINE float widen(int8_t x) { return float(x); }
HASTEN_INLINE float widen(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

// round to nearest even; a NaN stays a (quiet) NaN
HASTEN_INLINE void narrow(float x, float* out) { *out = x; }
HASTEN_INLINE void narrow(float x, bf16* out) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        *out = bf16((bits >> 16) | 0x40);
    else
        *out = bf16((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

#if defined(__AVX512F__)

struct F16 {
    __m512 v;
};
HASTEN_INLINE F16 zero() { return {_mm512_setzero_ps()}; }
HASTEN_INLINE F16 splat(float x) { return {_mm512_set1_ps(x)}; }
HASTEN_INLINE F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
HASTEN_INLINE F16 load(const bf16* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
HASTEN_INLINE F16 load(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
HASTEN_INLINE F16 load_first(const float* p, int n) {
    return {_mm512_maskz_loadu_ps(__mmask16(first_lanes(n)), p)};
}
HASTEN_INLINE void store(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
HASTEN_INLINE void store_first(float* p, F16 a, int n) {
    _mm512_mask_storeu_ps(p, __mmask16(first_lanes(n)), a.v);
}
HASTEN_INLINE F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
HASTEN_INLINE F16 operator+(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
HASTEN_INLINE F16 operator-(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
HASTEN_INLINE F16 operator*(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
HASTEN_INLINE F16 operator/(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
// a > b ? a : b and a < b ? a : b, so the second where one is NaN
HASTEN_INLINE F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
HASTEN_INLINE F16 min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
HASTEN_INLINE uint32_t less(F16 a, F16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
HASTEN_INLINE uint32_t is_nan(F16 a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q); }
// lane i of a where bit i is set, else of b
HASTEN_INLINE F16 select(uint32_t bits, F16 a, F16 b) {
    return {_mm512_mask_blend_ps(__mmask16(bits), b.v, a.v)};
}
// a * 2^n for whole n in [-126, 128]
HASTEN_INLINE F16 scale_exponent(F16 a, F16 n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// rows become columns
HASTEN_INLINE void transpose(F16* row) {
    __m512 t[LANES], u[LANES];
    // inside each of the four 128-bit blocks of four rows ...
#pragma GCC unroll 8
    for (int i = 0; i < LANES; i += 2) {
        t[i] = _mm512_unpacklo_ps(row[i].v, row[i + 1].v);
        t[i + 1] = _mm512_unpackhi_ps(row[i].v, row[i + 1].v);
    }
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
            u[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            u[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    // ... then the blocks
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const __m512 a = _mm512_shuffle_f32x4(u[j], u[j + 4], 0x44);
        const __m512 b = _mm512_shuffle_f32x4(u[j], u[j + 4], 0xee);
        const __m512 c = _mm512_shuffle_f32x4(u[j + 8], u[j + 12], 0x44);
        const __m512 d = _mm512_shuffle_f32x4(u[j + 8], u[j + 12], 0xee);
        row[j].v = _mm512_shuffle_f32x4(a, c, 0x88);
        row[j + 4].v = _mm512_shuffle_f32x4(a, c, 0xdd);
        row[j + 8].v = _mm512_shuffle_f32x4(b, d, 0x88);
        row[j + 12].v = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
}
HASTEN_INLINE float sum(F16 a) {
    __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
HASTEN_INLINE float max(F16 a) {
    __m256 b = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_max_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}

#elif defined(__AVX2__)

struct F16 {
    __m256 lo, hi;
};
HASTEN_INLINE F16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
HASTEN_INLINE F16 splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
HASTEN_INLINE F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
HASTEN_INLINE __m256 widen8(const bf16* p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
HASTEN_INLINE F16 load(const bf16* p) { return {widen8(p), widen8(p + 8)}; }
HASTEN_INLINE F16 load(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
}
HASTEN_INLINE __m256i lane_mask(uint32_t bits, int from) {
    const __m256i lane = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                                          _mm256_set1_epi32(from));
    __m256i bit = _mm256_sllv_epi32(_mm256_set1_epi32(1), lane);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), bit), bit);
}
HASTEN_INLINE F16 load_first(const float* p, int n) {
    uint32_t bits = first_lanes(n);
    return {_mm256_maskload_ps(p, lane_mask(bits, 0)), _mm256_maskload_ps(p + 8, lane_mask(bits, 8))};
}
HASTEN_INLINE void store(float* p, F16 a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
HASTEN_INLINE void store_first(float* p, F16 a, int n) {
    uint32_t bits = first_lanes(n);
    _mm256_maskstore_ps(p, lane_mask(bits, 0), a.lo);
    _mm256_maskstore_ps(p + 8, lane_mask(bits, 8), a.hi);
}
HASTEN_INLINE F16 fma(F16 a, F16 b, F16 c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
HASTEN_INLINE F16 operator+(F16 a, F16 b) {
    return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
HASTEN_INLINE F16 operator-(F16 a, F16 b) {
    return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
HASTEN_INLINE F16 operator*(F16 a, F16 b) {
    return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
HASTEN_INLINE F16 operator/(F16 a, F16 b) {
    return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
HASTEN_INLINE F16 max(F16 a, F16 b) {
    return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
HASTEN_INLINE F16 min(F16 a, F16 b) {
    return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}
HASTEN_INLINE uint32_t less(F16 a, F16 b) {
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ))) |
           uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))) << 8;
}
HASTEN_INLINE uint32_t is_nan(F16 a) {
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q))) |
           uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q))) << 8;
}
HASTEN_INLINE F16 select(uint32_t bits, F16 a, F16 b) {
    return {_mm256_blendv_ps(b.lo, a.lo, _mm256_castsi256_ps(lane_mask(bits, 0))),
            _mm256_blendv_ps(b.hi, a.hi, _mm256_castsi256_ps(lane_mask(bits, 8)))};
}
HASTEN_INLINE __m256 scale_exponent8(__m256 a, __m256 n) {
    // in two steps, since 2^128 is no float
    const __m256i bias = _mm256_set1_epi32(127);
    __m256i whole = _mm256_cvtps_epi32(n);
    __m256i half = _mm256_srai_epi32(whole, 1);
    __m256i rest = _mm256_sub_epi32(whole, half);
    __m256 x = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
    __m256 y = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
    return _mm256_mul_ps(_mm256_mul_ps(a, x), y);
}
HASTEN_INLINE F16 scale_exponent(F16 a, F16 n) {
    return {scale_exponent8(a.lo, n.lo), scale_exponent8(a.hi, n.hi)};
}
HASTEN_INLINE void transpose8(__m256* row) {
    __m256 t[8], u[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            const __m256d a = _mm256_castps_pd(t[i + j]), b = _mm256_castps_pd(t[i + j + 2]);
            u[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
            u[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
        }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        row[j] = _mm256_permute2f128_ps(u[j], u[j + 4], 0x20);
        row[j + 4] = _mm256_permute2f128_ps(u[j], u[j + 4], 0x31);
    }
}
// rows become columns: four quarters, of which two change places
HASTEN_INLINE void transpose(F16* row) {
    __m256 quarter[4][8];
    for (int i = 0; i < 8; i++) {
        quarter[0][i] = row[i].lo, quarter[2][i] = row[i].hi;
        quarter[1][i] = row[i + 8].lo, quarter[3][i] = row[i + 8].hi;
    }
    for (int i = 0; i < 4; i++) transpose8(quarter[i]);
    for (int i = 0; i < 8; i++) {
        row[i] = {quarter[0][i], quarter[1][i]};
        row[i + 8] = {quarter[2][i], quarter[3][i]};
    }
}
HASTEN_INLINE float sum(F16 a) {
    __m256 b = _mm256_add_ps(a.lo, a.hi);
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
HASTEN_INLINE float max(F16 a) {
    __m256 b = _mm256_max_ps(a.lo, a.hi);
    __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_max_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}

#else

struct F16 {
    float v[LANES];
};
#define HASTEN_LANEWISE(expression)         \
    F16 r;                                  \
    for (int i = 0; i < LANES; i++) {       \
        r.v[i] = expression;                \
    }                                       \
    return r
HASTEN_INLINE F16 zero() { HASTEN_LANEWISE(0.0f); }
HASTEN_INLINE F16 splat(float x) { HASTEN_LANEWISE(x); }
HASTEN_INLINE F16 load(const float* p) { HASTEN_LANEWISE(p[i]); }
HASTEN_INLINE F16 load(const bf16* p) { HASTEN_LANEWISE(widen(p[i])); }
HASTEN_INLINE F16 load(const int8_t* p) { HASTEN_LANEWISE(widen(p[i])); }
HASTEN_INLINE F16 load_first(const float* p, int n) { HASTEN_LANEWISE(i < n ? p[i] : 0.0f); }
HASTEN_INLINE void store(float* p, F16 a) { memcpy(p, a.v, sizeof a.v); }
HASTEN_INLINE void store_first(float* p, F16 a, int n) {
    for (int i = 0; i < LANES && i < n; i++) p[i] = a.v[i];
}
HASTEN_INLINE F16 fma(F16 a, F16 b, F16 c) {
    HASTEN_LANEWISE(__builtin_fmaf(a.v[i], b.v[i], c.v[i]));
}
HASTEN_INLINE F16 operator+(F16 a, F16 b) { HASTEN_LANEWISE(a.v[i] + b.v[i]); }
HASTEN_INLINE F16 operator-(F16 a, F16 b) { HASTEN_LANEWISE(a.v[i] - b.v[i]); }
HASTEN_INLINE F16 operator*(F16 a, F16 b) { HASTEN_LANEWISE(a.v[i] * b.v[i]); }
HASTEN_INLINE F16 operator/(F16 a, F16 b) { HASTEN_LANEWISE(a.v[i] / b.v[i]); }
HASTEN_INLINE F16 max(F16 a, F16 b) { HASTEN_LANEWISE(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
HASTEN_INLINE F16 min(F16 a, F16 b) { HASTEN_LANEWISE(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
HASTEN_INLINE uint32_t less(F16 a, F16 b) {
    uint32_t bits = 0;
    for (int i = 0; i < LANES; i++) bits |= uint32_t(a.v[i] < b.v[i]) << i;
    return bits;
}
HASTEN_INLINE uint32_t is_nan(F16 a) {
    uint32_t bits = 0;
    for (int i = 0; i < LANES; i++) bits |= uint32_t(a.v[i] != a.v[i]) << i;
    return bits;
}
HASTEN_INLINE F16 select(uint32_t bits, F16 a, F16 b) {
    HASTEN_LANEWISE(bits >> i & 1 ? a.v[i] : b.v[i]);
}
HASTEN_INLINE float power_of_two(int n) {
    uint32_t bits = uint32_t(n + 127) << 23;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
HASTEN_INLINE float scale_exponent1(float a, float n) {
    if (a != a || n != n) return a + n;
    int whole = int(n), half = whole >> 1;
    return a * power_of_two(half) * power_of_two(whole - half);
}
HASTEN_INLINE F16 scale_exponent(F16 a, F16 n) { HASTEN_LANEWISE(scale_exponent1(a.v[i], n.v[i])); }
HASTEN_INLINE void transpose(F16* row) {
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < i; j++) {
            const float x = row[i].v[j];
            row[i].v[j] = row[j].v[i];
            row[j].v[i] = x;
        }
}
HASTEN_INLINE float sum(F16 a) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) a.v[i] = a.v[i] + a.v[i + half];
    return a.v[0];
}
HASTEN_INLINE float max(F16 a) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) a.v[i] = a.v[i] > a.v[i + half] ? a.v[i] : a.v[i + half];
    return a.v[0];
}
#undef HASTEN_LANEWISE

#endif

// e^x with a relative error of at most 2e-7; 0 below -87 (also for -inf), inf for large x.
// x = n ln 2 + r with |r| <= ln 2 / 2; a polynomial of degree 6 in r, least maximal error.
HASTEN_INLINE F16 exp(F16 x) {
    const F16 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    uint32_t tiny = less(x, splat(-87.0f));
    F16 y = min(splat(89.0f), max(splat(-87.0f), x));
    F16 n = fma(y, splat(1.44269504f), magic) - magic;
    F16 r = fma(n, splat(-0.693145752f), y);
    r = fma(n, splat(-1.42860677e-6f), r);
    F16 p = fma(r, splat(0.0013814465f), splat(0.008368781f));
    p = fma(p, r, splat(0.041668393f));
    p = fma(p, r, splat(0.1666652f));
    p = fma(p, r, splat(0.49999994f));
    p = fma(p, r, splat(1.0f));
    p = fma(p, r, splat(1.0f));
    return select(tiny, zero(), scale_exponent(p, n));
}

// tanh with a relative error of at most 3e-7
HASTEN_INLINE F16 tanh(F16 x) {
    F16 size = max(zero() - x, x);
    F16 z = x * x;
    F16 p = fma(z, splat(-0.005717026f), splat(0.02065057f));
    p = fma(p, z, splat(-0.053743493f));
    p = fma(p, z, splat(0.13331491f));
    p = fma(p, z, splat(-0.33333284f));
    F16 near_zero = fma(x * z, p, x);
    F16 far = splat(1.0f) - splat(2.0f) / (exp(size + size) + splat(1.0f));
    far = select(less(x, zero()), zero() - far, far);
    return select(less(size, splat(0.625f)), near_zero, far);
}

}  // namespace HASTEN_LEVEL
}  // namespace hasten
