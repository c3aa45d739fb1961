// Sums and multiples of rows.
#include "ops.h"

namespace hasten {
namespace HASTEN_LEVEL {

void add(const AddArgs& a) {
    const int64_t rows = a.outer * a.inner;
    const int64_t grain = 1 + 4096 / (a.size + 1);
    parallel(rows, grain, rows * a.size / 4, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            const int64_t i = row / a.inner, j = row % a.inner;
            const float* x = a.x + i * a.x_outer + j * a.x_inner;
            const float* y = a.y ? a.y + i * a.y_outer + j * a.y_inner : nullptr;
            float* out = a.out + i * a.out_outer + j * a.out_inner;
            for (int64_t k = 0; k < a.size; k += LANES) {
                const int n = a.size - k < LANES ? int(a.size - k) : LANES;
                F16 sum = load_first(x + k, n) * splat(a.factor);
                if (y) sum = sum + load_first(y + k, n);
                store_first(out + k, sum, n);
            }
        }
    });
}

}  // namespace HASTEN_LEVEL
}  // namespace hasten
