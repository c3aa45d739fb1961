// float16 to float, which is exact, and back, to the nearest, halves to even.
#pragma once

#include <cstdint>
#include <cstring>

namespace hasten {

inline float half_to_float(uint16_t x) {
    const uint32_t sign = uint32_t(x & 0x8000) << 16, exponent = x >> 10 & 31, mantissa = x & 1023;
    uint32_t bits;
    if (exponent == 31) {
        bits = sign | 0x7f800000u | mantissa << 13;
    } else if (exponent) {
        bits = sign | (exponent + 112) << 23 | mantissa << 13;
    } else {  // zero or subnormal: mantissa * 2^-24 is exact
        const float y = float(mantissa) * 0x1p-24f;
        return sign ? -y : y;
    }
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

inline uint16_t float_to_half(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return sign | 0x7e00;   // NaN
    if (bits >= 0x477ff000u) return sign | 0x7c00;  // from 65520 on: infinity
    if (bits < 0x38800000u) {  // subnormal: the sum rounds to a multiple of 2^-24
        float y;
        std::memcpy(&y, &bits, 4);
        y += 0.5f;
        std::memcpy(&bits, &y, 4);
        return sign | uint16_t(bits - 0x3f000000u);
    }
    bits += 0xfffu + (bits >> 13 & 1);
    return sign | uint16_t((bits - 0x38000000u) >> 13);
}

}  // namespace hasten
