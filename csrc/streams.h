// Rows in and out of weights of 8 and 4 bits (hasten.kernels.linear.quantized has the layout).
#pragma once

#include <cstdint>

namespace hasten {

struct Stream {
    uint8_t* data;
    int64_t n, k;
    int64_t group;  // 0: int8
    bool asymmetric, gated;

    int64_t panels() const;
    int64_t panel_bytes() const;
    int64_t bytes() const { return panels() * panel_bytes(); }
};

// Rows [first, first + rows): codes [rows, k] int8 with scales float [rows], or bytes below 16 with
// scales float16 [rows, k / group] and, if asymmetric, zeros.
void put_int8(const Stream&, int64_t first, int64_t rows, const int8_t* codes, int64_t stride,
              const float* scale);
void put_int4(const Stream&, int64_t first, int64_t rows, const uint8_t* codes, int64_t stride,
              const uint16_t* scale, const uint8_t* zero);
// Row ids[i], or row i without ids, as floats: (code - zero) * scale.
void dequantize(const Stream&, const int64_t* ids, int64_t rows, float* out);

}  // namespace hasten
