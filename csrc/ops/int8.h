// A stream of int8 weights, whatever multiplies by it: a unit is 16 inputs in steps of four, a tail
// the scales, and a sum is an exact 32-bit integer.
#pragma once

#include "quantized.h"

namespace hasten {
namespace HASTEN_LEVEL {

struct Int8Stream {
    static constexpr int64_t QUADS = 4;  // steps of four inputs in a unit

    static int64_t unit(const QuantizedArgs&) { return 4 * QUADS; }
    static int64_t block(const QuantizedArgs& a) { return a.k; }
    static int64_t unit_bytes(const QuantizedArgs&) { return 64 * QUADS; }
    static int64_t tail_bytes(const QuantizedArgs&) { return 64; }

    static HASTEN_INLINE F16 result(const char* held, const uint8_t* tail, float scale) {
        return to_float(load((const int32_t*)held)) * (splat(scale) * load((const float*)tail));
    }
};

}  // namespace HASTEN_LEVEL
}  // namespace hasten
