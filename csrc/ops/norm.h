// y = x / sqrt(mean(x^2) + eps) * weight (+ add). The sum of squares has 64 lanes (lane j takes the
// elements j, j + 64, ...), which are then added by a fixed tree.
#pragma once

#include "ops.h"

namespace hasten {
namespace HASTEN_LEVEL {

// add: null, or what is added to the result
inline void row_norm(const float* x, const float* weight, float eps, int64_t size,
                     const float* add, float* out) {
    F16 total[4] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 4 * LANES <= size; i += 4 * LANES)
        for (int j = 0; j < 4; j++) {
            F16 v = load(x + i + j * LANES);
            total[j] = fma(v, v, total[j]);
        }
    for (int j = 0; i < size; i += LANES, j++) {
        F16 v = load_first(x + i, size - i < LANES ? int(size - i) : LANES);
        total[j] = fma(v, v, total[j]);
    }
    const float squares = sum((total[0] + total[1]) + (total[2] + total[3]));
    const F16 factor = splat(1.0f / __builtin_sqrtf(squares / float(size) + eps));
    for (i = 0; i < size; i += LANES) {
        const int n = size - i < LANES ? int(size - i) : LANES;
        F16 y = load_first(x + i, n) * factor * load_first(weight + i, n);
        if (add) y = y + load_first(add + i, n);
        store_first(out + i, y, n);
    }
}

}  // namespace HASTEN_LEVEL
}  // namespace hasten
