// y = x / sqrt(mean(x^2) + eps) * weight (+ add). The sum of squares has 64 lanes (lane j takes the
// elements j, j + 64, ...), which are then added by a fixed tree.
#include "ops.h"

namespace hasten {
namespace HASTEN_LEVEL {
namespace {

// add: null, or what is added to the result
void row_norm(const float* x, const float* weight, float eps, int64_t size, const float* add,
              float* out) {
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

void row_add(const float* x, const float* y, int64_t size, float* out) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(out + i, load(x + i) + load(y + i));
    if (i < size) {
        const int n = int(size - i);
        store_first(out + i, load_first(x + i, n) + load_first(y + i, n), n);
    }
}

}  // namespace

void rms_norm(const NormArgs& a) {
    const int64_t rows = a.outer * a.inner;
    const int64_t grain = 1 + 4096 / (a.size + 1);
    parallel(rows, grain, rows * a.size / 4, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            const int64_t i = row / a.inner, j = row % a.inner;
            const float* x = a.x + i * a.x_outer + j * a.x_inner;
            if (a.residual) {
                float* total = a.sum + row * a.size;
                row_add(x, a.residual + i * a.residual_outer + j * a.residual_inner, a.size, total);
                x = total;
            }
            const float* add = a.add ? a.add + i * a.add_outer + j * a.add_inner : nullptr;
            row_norm(x, a.weight, a.eps, a.size, add, a.out + i * a.out_outer + j * a.out_inner);
        }
    });
}

}  // namespace HASTEN_LEVEL
}  // namespace hasten
