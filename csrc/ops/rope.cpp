// Norms and rotates queries and keys, and writes keys and values to their pages.
#include "norm.h"
#include "quantize.h"

namespace hasten {
namespace HASTEN_LEVEL {
namespace {

// (x, y) -> (x cos - y sin, y cos + x sin) for the pairs (j, j + half)
HASTEN_INLINE void rotate(float* x, const float* cos, const float* sin, int64_t half) {
    for (int64_t j = 0; j < half; j++) {
        const float a = x[j], b = x[j + half];
        x[j] = __builtin_fmaf(a, cos[j], -(b * sin[j]));
        x[j + half] = __builtin_fmaf(b, cos[j], a * sin[j]);
    }
}

// One key goes to a column of its page, one value to a row.
template <class T>
struct Writer {
    const Pages& g;
    char* k_page;
    char* v_page;
    int64_t at;

    void key(const float* x) const {
        for (int64_t d = 0; d < g.dim; d++) narrow(x[d], (T*)k_page + d * PAGE + at);
    }
    void value(const float* x) const {
        T* to = (T*)v_page + at * g.padded;
        for (int64_t d = 0; d < g.v_dim; d++) narrow(x[d], to + d);
        for (int64_t d = g.v_dim; d < g.padded; d++) to[d] = T(0);
    }
};

// each quantized as a row of activations is
template <>
struct Writer<int8_t> {
    const Pages& g;
    char* k_page;
    char* v_page;
    int64_t at;

    void scale(int64_t which, float x) const {
        memcpy(k_page + g.dim * PAGE + (which * PAGE + at) * 4, &x, 4);
    }
    void key(const float* x) const {
        scale(0, quantize_strided(x, g.dim, (int8_t*)k_page + at, PAGE));
    }
    void value(const float* x) const {
        if (g.padded == 0) return;
        int8_t* to = (int8_t*)v_page + at * g.padded;
        scale(1, quantize_strided(x, g.v_dim, to, 1));
        for (int64_t d = g.v_dim; d < g.padded; d++) to[d] = 0;
    }
};

void norm_spans(const float* x, int64_t size, const Norm& norm, float eps, float* out) {
    for (int64_t i = 0; i < size; i += norm.size)
        row_norm(x + i, norm.weight, eps, norm.size, nullptr, out + i);
}

template <class T>
void append_of(const AppendArgs& a) {
    const Pages& g = a.pages;
    const int64_t kv_heads = g.groups * g.heads;
    const int64_t work = a.rows * ((a.q_heads + 2 * kv_heads) * g.dim + kv_heads * g.v_dim);
    parallel(a.rows, 1, work, [&](int64_t begin, int64_t end) {
        float* keys = (float*)scratch(size_t(kv_heads * g.dim) * 4);
        for (int64_t row = begin; row < end; row++) {
            const float* cos = a.cos + a.positions[row] * a.half;
            const float* sin = a.sin + a.positions[row] * a.half;
            float* q = a.q + row * a.q_stride;
            if (a.q_norm.weight) norm_spans(q, a.q_heads * g.dim, a.q_norm, a.eps, q);
            for (int64_t h = 0; h < a.q_heads; h++) rotate(q + h * g.dim, cos, sin, a.half);
            const float* k = a.k + row * a.k_stride;
            if (a.k_norm.weight)
                norm_spans(k, kv_heads * g.dim, a.k_norm, a.eps, keys);
            else
                memcpy(keys, k, size_t(kv_heads * g.dim) * 4);
            const int64_t block = a.slots[row] / PAGE, at = a.slots[row] % PAGE;
            for (int64_t h = 0; h < kv_heads; h++) {
                const int64_t page =
                    g.table[(a.table_row[row] * g.groups + h / g.heads) * g.blocks + block];
                const int64_t index = page * g.heads + h % g.heads;
                const Writer<T> write{g, (char*)g.k + index * g.k_page(),
                                      (char*)g.v + index * g.v_page(), at};
                float* key = keys + h * g.dim;
                if (a.rotate_keys) rotate(key, cos, sin, a.half);
                write.key(key);
                write.value(a.v + row * a.v_stride + h * g.v_dim);
            }
        }
    });
}

}  // namespace

void append(const AppendArgs& a) {
    switch (a.pages.type) {
        case Stored::f32: append_of<float>(a); break;
        case Stored::bf16: append_of<bf16>(a); break;
        case Stored::i8: append_of<int8_t>(a); break;
    }
}

}  // namespace HASTEN_LEVEL
}  // namespace hasten
