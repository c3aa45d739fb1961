// Normalization of rows (norm.h), alone or after the sum with a residual.
#include "norm.h"

namespace hasten {
namespace HASTEN_LEVEL {
namespace {

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
