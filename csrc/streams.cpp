#include "streams.h"

#include <cstring>

#include "half.h"
#include "parallel.h"

namespace hasten {
namespace {

constexpr int64_t LANES = 16, STRIP = 4;
constexpr int64_t ROWS = LANES * STRIP;  // rows of an item of work, usually a strip
constexpr int64_t BLOCK = 256;           // inputs that go to all of them before the next ones

// Where an output stands: its strip, how wide that is, and its place across the strip.
struct Place {
    uint8_t* strip;
    int64_t width, lane;

    Place(const Stream& s, int64_t row) {
        const int64_t half = s.n / 2, in_half = s.gated && row >= half ? row - half : row;
        const int64_t panel =
            s.gated ? in_half / LANES * 2 + (row >= half) : row / LANES;
        const int64_t first = panel / STRIP * STRIP, left = s.panels() - first;
        strip = s.data + first * s.panel_bytes();
        width = left < STRIP ? left : STRIP;
        lane = panel % STRIP * LANES + in_half % LANES;
    }
};

int64_t quads(const Stream& s) { return (s.k + 15) / 16 * 4; }

}  // namespace

int64_t Stream::panels() const {
    return gated ? (n / 2 + LANES - 1) / LANES * 2 : (n + LANES - 1) / LANES;
}

int64_t Stream::panel_bytes() const {
    return group ? LANES * (k / group) * (group / 2 + 2 + asymmetric)
                 : LANES * ((k + 15) / 16 * 16 + 4);
}

void put_int8(const Stream& s, int64_t first, int64_t rows, const int8_t* codes, int64_t stride,
              const float* scale) {
    parallel(rows, ROWS, rows * s.k, [&](int64_t begin, int64_t end) {
        for (int64_t from = begin; from < end; from += ROWS) {
            const int64_t to = from + ROWS < end ? from + ROWS : end;
            for (int64_t k = 0; k < s.k; k += BLOCK)
                for (int64_t row = from; row < to; row++) {
                    const Place at(s, first + row);
                    uint8_t* out = at.strip + at.lane * 4;
                    const int64_t step = at.width * LANES * 4;
                    for (int64_t i = k; i < s.k && i < k + BLOCK; i++)
                        out[i / 4 * step + i % 4] = uint8_t(codes[row * stride + i]) ^ 128;
                }
            for (int64_t row = from; row < to; row++) {
                const Place at(s, first + row);
                std::memcpy(at.strip + quads(s) * at.width * LANES * 4 + at.lane * 4, scale + row, 4);
            }
        }
    });
}

void put_int4(const Stream& s, int64_t first, int64_t rows, const uint8_t* codes, int64_t stride,
              const uint16_t* scale, const uint8_t* zero) {
    const int64_t groups = s.k / s.group;
    parallel(rows, ROWS, rows * s.k, [&](int64_t begin, int64_t end) {
        for (int64_t from = begin; from < end; from += ROWS) {
            const int64_t to = from + ROWS < end ? from + ROWS : end;
            for (int64_t g = 0; g < groups; g++)
                for (int64_t row = from; row < to; row++) {
                    const Place at(s, first + row);
                    const int64_t outputs = at.width * LANES;
                    uint8_t* unit = at.strip + g * outputs * (s.group / 2 + 2 + s.asymmetric);
                    const uint8_t* in = codes + row * stride + g * s.group;
                    for (int64_t i = 0; i < s.group; i += 8)
                        for (int64_t j = 0; j < 4; j++)
                            unit[i / 8 * outputs * 4 + at.lane * 4 + j] =
                                uint8_t(in[i + j] | in[i + j + 4] << 4);
                    uint8_t* scales = unit + outputs * s.group / 2;
                    std::memcpy(scales + at.lane * 2, scale + row * groups + g, 2);
                    if (s.asymmetric) scales[outputs * 2 + at.lane] = zero[row * groups + g];
                }
        }
    });
}

void dequantize(const Stream& s, const int64_t* ids, int64_t rows, float* out) {
    parallel(rows, 4, rows * s.k, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            const Place at(s, ids ? ids[row] : row);
            const int64_t outputs = at.width * LANES;
            float* to = out + row * s.k;
            if (!s.group) {
                float scale;
                std::memcpy(&scale, at.strip + (quads(s) * outputs + at.lane) * 4, 4);
                const uint8_t* from = at.strip + at.lane * 4;
                for (int64_t i = 0; i < s.k; i++)
                    to[i] = float(int(from[i / 4 * outputs * 4 + i % 4]) - 128) * scale;
                continue;
            }
            for (int64_t g = 0; g < s.k / s.group; g++) {
                const uint8_t* unit = at.strip + g * outputs * (s.group / 2 + 2 + s.asymmetric);
                const uint8_t* scales = unit + outputs * s.group / 2;
                uint16_t half;
                std::memcpy(&half, scales + at.lane * 2, 2);
                const float scale = half_to_float(half);
                const int zero = s.asymmetric ? scales[outputs * 2 + at.lane] : 8;
                for (int64_t i = 0; i < s.group; i++) {
                    const int byte = unit[(i / 8 * outputs + at.lane) * 4 + i % 4];
                    to[g * s.group + i] = float((i & 4 ? byte >> 4 : byte & 15) - zero) * scale;
                }
            }
        }
    });
}

}  // namespace hasten
