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

struct QuantizedBlock {
    float scale;
    int32_t sum;  // of the codes
};

// Code i of a block goes to codes[i * stride].
HASTEN_INLINE QuantizedBlock quantize_block(const float* x, int64_t size, int8_t* codes,
                                            int64_t stride) {
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
    if (!finite || amax < 0x1p-100f) {
        for (int64_t i = 0; i < size; i++) codes[i * stride] = 0;
        return {finite ? 0.0f : std::numeric_limits<float>::quiet_NaN(), 0};
    }
    // x * (127 / amax) + 1.5 * 2^23 is rounded to a whole number, whose low byte is the code
    const float inverse = 127.0f / amax, magic = 12582912.0f;
    int32_t total = 0;
    for (int64_t i = 0; i < size; i++) {
        const float shifted = x[i] * inverse + magic;
        int32_t bits;
        memcpy(&bits, &shifted, 4);
        bits -= 0x4b400000;
        codes[i * stride] = int8_t(bits);
        total += bits;
    }
    return {amax / 127.0f, total};
}

// Row `row` of x [rows, k] into its place.
HASTEN_INLINE void quantize_row(const float* x, int64_t k, int64_t block, int32_t factor,
                                const Activations& a, int64_t row) {
    int8_t* codes = a.codes + row * a.stride;
    for (int64_t b = 0; b < a.blocks; b++) {
        const QuantizedBlock made = quantize_block(x + b * block, block, codes + b * block, 1);
        a.scales[row * a.blocks + b] = made.scale;
        a.sums[row * a.blocks + b] = made.sum * factor;
    }
    for (int64_t i = k; i % 16; i++) codes[i] = 0;
}

}  // namespace HASTEN_LEVEL
}  // namespace hasten
