// Activations as 8-bit codes: what every kernel on quantized weights multiplies by, and how pages
// hold keys and values in 8 bits.
//
// For each block of `block` inputs of a row, with amax = max |x|:
//     scale = amax / 127,  code = round(x * (127 / amax)), halves to even, in [-127, 127].
// A block whose amax is below 2^-100 has scale 0 and codes 0; one that holds an infinity or a NaN
// has scale NaN and codes 0, so that it shows in every output. Each step is one IEEE operation on
// float32 or exact, so every instruction set gives the same codes and scales.
#pragma once

#include <cmath>
#include <limits>

#include "ops.h"

namespace hasten {
namespace HASTEN_LEVEL {

// Rows of quantized activations. Sums of codes correct for weights that are stored unsigned; they
// are multiplied by a factor of the weight's format, so that they are what its sums start from.
struct Activations {
    int8_t* codes;   // [rows][stride], zeros from k to a multiple of 16
    float* scales;   // [rows][blocks]
    int32_t* sums;   // [rows][blocks], sum of a block's codes times the factor
    int64_t stride, blocks;

    static int64_t stride_for(int64_t k) { return (k + 63) / 64 * 64; }
    // memory for so many rows of k inputs in blocks of `block` (a divisor of k)
    static size_t bytes(int64_t rows, int64_t k, int64_t block) {
        return size_t(rows * (stride_for(k) + 8 * (k / block)) + 64);
    }
    Activations(void* memory, int64_t rows, int64_t k, int64_t block)
        : codes((int8_t*)memory),
          scales((float*)(codes + rows * stride_for(k))),
          sums((int32_t*)(scales + rows * (k / block))),
          stride(stride_for(k)),
          blocks(k / block) {}
};

// Codes of x * inverse, zeros behind them up to a multiple of 16, and gives their sum. The product
// plus 1.5 * 2^23 is rounded to a whole number, whose low byte is the code.
constexpr float MAGIC = 12582912.0f;
constexpr int32_t MAGIC_BITS = 0x4b400000;
#if defined(__AVX512F__)
HASTEN_INLINE __m512i encode(const float* x, int64_t size, __m512 inverse, int8_t* codes) {
    __m512i total = _mm512_setzero_si512();
    for (int64_t i = 0; i < size; i += LANES) {
        const F16 some = size - i < LANES ? load_first(x + i, int(size - i)) : load(x + i);
        const F16 shifted = some * F16{inverse} + splat(MAGIC);
        const __m512i code =
            _mm512_sub_epi32(_mm512_castps_si512(shifted.v), _mm512_set1_epi32(MAGIC_BITS));
        _mm_storeu_si128((__m128i*)(codes + i), _mm512_cvtepi32_epi8(code));
        total = _mm512_add_epi32(total, code);
    }
    return total;
}
HASTEN_INLINE int32_t encode(const float* x, int64_t size, float inverse, int8_t* codes) {
    return _mm512_reduce_add_epi32(encode(x, size, _mm512_set1_ps(inverse), codes));
}
#else
HASTEN_INLINE int32_t encode(const float* x, int64_t size, float inverse, int8_t* codes) {
    int32_t total = 0;
    for (int64_t i = 0; i < size; i++) {
        const float shifted = x[i] * inverse + MAGIC;
        int32_t bits;
        memcpy(&bits, &shifted, 4);
        bits -= MAGIC_BITS;
        codes[i] = int8_t(bits);
        total += bits;
    }
    for (int64_t i = size; i % 16; i++) codes[i] = 0;
    return total;
}
#endif

// amax of a block; its scale if it has no codes but zeros, else -1.
HASTEN_INLINE float block_amax(const float* x, int64_t size, float* scale) {
    // magnitudes order as the integers of their bits, NaN above infinity above the rest
    int32_t top = 0;
    for (int64_t i = 0; i < size; i++) {
        int32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        top = bits > top ? bits : top;
    }
    float amax;
    memcpy(&amax, &top, 4);
    const bool finite = top < 0x7f800000;
    *scale = !finite           ? std::numeric_limits<float>::quiet_NaN()
             : amax < 0x1p-100f ? 0.0f
                                : -1.0f;
    return amax;
}

HASTEN_INLINE void quantize_block(const float* x, int64_t size, int32_t factor, int8_t* codes,
                                  float* scale, int32_t* sum) {
    const float amax = block_amax(x, size, scale);
    if (*scale != -1.0f) {
        memset(codes, 0, size_t(size + 15) / 16 * 16);
        *sum = 0;
        return;
    }
    *scale = amax / 127.0f;
    *sum = encode(x, size, 127.0f / amax, codes) * factor;
}

// A block whose code i goes to codes[i * stride]; gives its scale.
HASTEN_INLINE float quantize_strided(const float* x, int64_t size, int8_t* codes, int64_t stride) {
    float scale;
    const float amax = block_amax(x, size, &scale);
    if (scale != -1.0f) {
        for (int64_t i = 0; i < size; i++) codes[i * stride] = 0;
        return scale;
    }
    const float inverse = 127.0f / amax;
    for (int64_t i = 0; i < size; i++) {
        const float shifted = x[i] * inverse + MAGIC;
        int32_t bits;
        memcpy(&bits, &shifted, 4);
        codes[i * stride] = int8_t(bits - MAGIC_BITS);
    }
    return amax / 127.0f;
}

#if defined(__AVX512F__)
// Each of four vectors folded to one number.
template <class Op>
HASTEN_INLINE __m128i fold_four(const __m512i (&v)[4], const Op& op) {
    const __m512i ab = op(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
    const __m512i cd = op(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
    __m512i all = op(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    all = op(all, _mm512_shuffle_i64x2(all, all, 0x4e));
    all = op(all, _mm512_shuffle_i64x2(all, all, 0xb1));
    return _mm512_castsi512_si128(all);
}

// Four blocks that follow each other, of a multiple of 16 inputs. For small blocks the maximum and
// the sum of a vector's numbers take most of the time, and four vectors take hardly more than one.
HASTEN_INLINE void quantize_four(const float* x, int64_t size, int32_t factor, int8_t* codes,
                                 float* scale, int32_t* sum) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i of_block[4];
#pragma GCC unroll 4
    for (int b = 0; b < 4; b++) {
        of_block[b] = _mm512_setzero_si512();
        for (int64_t i = 0; i < size; i += LANES) {
            const __m512i bits = _mm512_castps_si512(load(x + b * size + i).v);
            of_block[b] = _mm512_max_epi32(of_block[b], _mm512_and_si512(bits, magnitude));
        }
    }
    const auto larger = [](__m512i a, __m512i b) { return _mm512_max_epi32(a, b); };
    const __m128i top = fold_four(of_block, larger);
    const __m128 amax = _mm_castsi128_ps(top), most = _mm_set1_ps(127.0f);
    const __m128i least = _mm_castps_si128(_mm_set1_ps(0x1p-100f));
    if (_mm_movemask_epi8(_mm_cmplt_epi32(top, least)) ||
        _mm_movemask_epi8(_mm_cmpgt_epi32(top, _mm_set1_epi32(0x7f7fffff)))) {
        for (int b = 0; b < 4; b++)
            quantize_block(x + b * size, size, factor, codes + b * size, scale + b, sum + b);
        return;
    }
    _mm_storeu_ps(scale, _mm_div_ps(amax, most));
    const __m512 inverse = _mm512_castps128_ps512(_mm_div_ps(most, amax));
#pragma GCC unroll 4
    for (int b = 0; b < 4; b++)
        of_block[b] = encode(x + b * size, size,
                             _mm512_permutexvar_ps(_mm512_set1_epi32(b), inverse), codes + b * size);
    const auto plus = [](__m512i a, __m512i b) { return _mm512_add_epi32(a, b); };
    const __m128i total = fold_four(of_block, plus);
    _mm_storeu_si128((__m128i*)sum, _mm_mullo_epi32(total, _mm_set1_epi32(factor)));
}
#endif

// Row `row` of x [rows, k] into its place.
HASTEN_INLINE void quantize_row(const float* x, int64_t k, int64_t block, int32_t factor,
                                const Activations& a, int64_t row) {
    int8_t* codes = a.codes + row * a.stride;
    int64_t b = 0;
#if defined(__AVX512F__)
    for (; block % LANES == 0 && b + 4 <= a.blocks; b += 4)
        quantize_four(x + b * block, block, factor, codes + b * block,
                      a.scales + row * a.blocks + b, a.sums + row * a.blocks + b);
#endif
    for (; b < a.blocks; b++)
        quantize_block(x + b * block, block, factor, codes + b * block,
                       a.scales + row * a.blocks + b, a.sums + row * a.blocks + b);
}

}  // namespace HASTEN_LEVEL
}  // namespace hasten
