// float16 to float, exact.
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

}  // namespace hasten
