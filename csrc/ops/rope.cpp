// Rotates queries and keys and writes keys and values to their pages.
#include "ops.h"

namespace hasten {
namespace HASTEN_LEVEL {
namespace {

// (x, y) -> (x cos - y sin, y cos + x sin) for the pairs (j, j + half)
HASTEN_INLINE void rotate(float x, float y, float c, float s, float* rx, float* ry) {
    *rx = __builtin_fmaf(x, c, -(y * s));
    *ry = __builtin_fmaf(y, c, x * s);
}

template <class T>
void append_of(const AppendArgs& a) {
    const Pages& g = a.pages;
    const int64_t kv_heads = g.groups * g.heads;
    const int64_t work = a.rows * ((a.q_heads + 2 * kv_heads) * g.dim + kv_heads * g.v_dim);
    parallel(a.rows, 1, work, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            const float* c = a.cos + a.positions[row] * a.half;
            const float* s = a.sin + a.positions[row] * a.half;
            for (int64_t h = 0; h < a.q_heads; h++) {
                float* q = a.q + row * a.q_stride + h * g.dim;
                for (int64_t j = 0; j < a.half; j++)
                    rotate(q[j], q[j + a.half], c[j], s[j], &q[j], &q[j + a.half]);
            }
            const int64_t block = a.slots[row] / PAGE, at = a.slots[row] % PAGE;
            for (int64_t h = 0; h < kv_heads; h++) {
                const int64_t page =
                    g.table[(a.table_row[row] * g.groups + h / g.heads) * g.blocks + block];
                const int64_t index = page * g.heads + h % g.heads;
                T* to = (T*)g.k + index * g.dim * PAGE + at;
                const float* k = a.k + row * a.k_stride + h * g.dim;
                for (int64_t j = 0; j < a.half; j++) {
                    float x, y;
                    rotate(k[j], k[j + a.half], c[j], s[j], &x, &y);
                    narrow(x, &to[j * PAGE]);
                    narrow(y, &to[(j + a.half) * PAGE]);
                }
                for (int64_t j = 2 * a.half; j < g.dim; j++) narrow(k[j], &to[j * PAGE]);
                T* row_to = (T*)g.v + (index * PAGE + at) * g.padded;
                const float* v = a.v + row * a.v_stride + h * g.v_dim;
                for (int64_t j = 0; j < g.v_dim; j++) narrow(v[j], &row_to[j]);
                for (int64_t j = g.v_dim; j < g.padded; j++) row_to[j] = T(0);
            }
        }
    });
}

}  // namespace

void append(const AppendArgs& a) {
    if (a.pages.bf16)
        append_of<bf16>(a);
    else
        append_of<float>(a);
}

}  // namespace HASTEN_LEVEL
}  // namespace hasten
