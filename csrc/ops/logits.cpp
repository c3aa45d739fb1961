// What sampling needs of a row of logits, and the expert choice of a router.
//
// A row is cut into blocks of fixed size, each of which is read from memory once; a block has 16
// lanes and a fixed tree, and the blocks are folded in ascending order, so that one long row can
// use several threads.
#include <cmath>

#include "../select.h"
#include "ops.h"

namespace hasten {
namespace HASTEN_LEVEL {
namespace {

constexpr int64_t BLOCK = 8192;

HASTEN_INLINE F16 load_columns(const float* x, int64_t i, int64_t to) {
    if (to - i >= LANES) return load(x + i);
    const int n = int(to - i);
    return select(first_lanes(n), load_first(x + i, n), splat(-INFINITY));
}

// Largest value of each cell of `width` columns, and of all; a NaN counts as nothing, and is told.
float cell_maxima(const float* x, int64_t from, int64_t to, int64_t width, float* cells,
                  bool* has_nan) {
    float top = -INFINITY;
    uint32_t nan = 0;
    for (int64_t cell = from; cell < to; cell += width) {
        const int64_t end = cell + width < to ? cell + width : to;
        F16 best = splat(-INFINITY);
        for (int64_t i = cell; i < end; i += LANES) {
            const F16 v = load_columns(x, i, end);
            nan |= is_nan(v);
            best = max(v, best);  // the second where one is NaN
        }
        *cells = max(best);
        top = *cells > top ? *cells : top;
        cells++;
    }
    *has_nan = nan != 0;
    return top;
}

float block_sum_exp(const float* x, int64_t from, int64_t to, float shift) {
    F16 total = zero();
    for (int64_t i = from; i < to; i += LANES)
        total = total + exp(load_columns(x, i, to) - splat(shift));
    return sum(total);
}

HASTEN_INLINE float exp1(float x) {
    float all[LANES];
    store(all, exp(splat(x)));
    return all[0];
}

// The first `k` ids of the row in total order. The k-th largest cell maximum bounds the k-th largest
// value from below, so that few cells need a second look.
void top_ids(const float* x, int64_t size, const float* cells, int64_t width, int64_t k,
             int64_t* ids) {
    const int64_t count = (size + width - 1) / width, room = 4 * k + BLOCK;
    char* memory = (char*)scratch(size_t(room) * 8 + size_t(count) * 4);
    uint64_t* keys = (uint64_t*)memory;
    float bound = -INFINITY;
    if (count >= k) bound = kth_largest(cells, count, k, (float*)(memory + room * 8));
    int64_t found = 0;
    for (int64_t cell = 0; cell < count; cell++) {
        if (!(cells[cell] >= bound)) continue;
        const int64_t from = cell * width, to = from + width < size ? from + width : size;
        for (int64_t i = from; i < to; i += LANES) {
            const F16 v = load_columns(x, i, to);
            if (less(v, splat(bound)) == 0xffff) continue;
            for (int64_t j = i; j < to && j < i + LANES; j++) {
                const float value = x[j] == x[j] ? x[j] : -INFINITY;
                if (value >= bound) keys[found++] = key_of(value, uint32_t(j));
            }
        }
        if (found > room - width) {  // many equal values
            first_keys(keys, found, k);
            found = k;
        }
    }
    first_keys(keys, found, k);
    for (int64_t i = 0; i < k; i++) ids[i] = int64_t(keys[i] & 0xffffffff);
}

// e^x for x <= 0, 0 below -700 and for a NaN: 2^n e^r with |r| <= ln 2 / 2 and the Taylor series
// of e^r, all in separate multiplications and additions, so that its bits are the same everywhere.
HASTEN_INLINE double exp_below(double x) {
    const double shifted = x * 1.4426950408889634 + 6755399441055744.0;  // 1.5 * 2^52
    const double n = shifted - 6755399441055744.0;
    const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
    double p = 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    // the low bits of `shifted` hold n
    const uint64_t power = (__builtin_bit_cast(uint64_t, shifted) + 1023) << 52;
    const double y = p * __builtin_bit_cast(double, power);
    return x >= -700.0 ? y : 0.0;
}

double block_sum_exp_double(const float* x, int64_t count, float shift, double temperature) {
    double lane[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int j = 0; j < LANES; j++)
            lane[j] += exp_below((double(x[i + j]) - double(shift)) / temperature);
    for (int j = 0; i + j < count; j++)
        lane[j] += exp_below((double(x[i + j]) - double(shift)) / temperature);
    for (int half = LANES / 2; half; half /= 2)
        for (int j = 0; j < half; j++) lane[j] += lane[j + half];
    return lane[0];
}

}  // namespace

void row_top(const RowTopArgs& a) {
    const int64_t blocks = (a.size + BLOCK - 1) / BLOCK;
    int64_t width = 512;  // enough cells for a bound, and few that reach it
    while (width > LANES && a.size < 4 * width * a.k) width /= 2;
    const int64_t cells = (a.size + width - 1) / width;
    struct Block {
        float max, sum;
        bool nan;
    };
    // an own array: scratch memory belongs to whoever runs a block
    Block* block = (Block*)__builtin_malloc(sizeof(Block) * size_t(a.rows * blocks + 1));
    float* cell = (float*)__builtin_malloc(sizeof(float) * size_t(a.rows * cells + 1));
    parallel(a.rows * blocks, 1, a.rows * a.size, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; item++) {
            const int64_t row = item / blocks, from = item % blocks * BLOCK;
            const int64_t to = from + BLOCK < a.size ? from + BLOCK : a.size;
            const float* x = a.x + row * a.x_stride;
            Block& b = block[item];
            b.max = cell_maxima(x, from, to, width, cell + row * cells + from / width, &b.nan);
            b.sum = block_sum_exp(x, from, to, b.max == -INFINITY ? 0.0f : b.max);
        }
    });
    parallel(a.rows, 1, a.rows * (a.size / 16 + 64 * a.k), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            const float* x = a.x + row * a.x_stride;
            const Block* b = block + row * blocks;
            bool nan = false;
            float top = -INFINITY;
            for (int64_t i = 0; i < blocks; i++) {
                nan = nan || b[i].nan;
                top = b[i].max > top ? b[i].max : top;
            }
            int64_t at = 0;
            if (!nan && top != -INFINITY) {
                const float* c = cell + row * cells;
                while (c[at] != top) at++;
                at *= width;
                while (x[at] != top) at++;
            }
            a.argmax[row] = at;
            a.max[row] = nan ? NAN : top;
            float total = 0.0f;
            for (int64_t i = 0; i < blocks; i++)
                if (b[i].max != -INFINITY) total = total + b[i].sum * exp1(b[i].max - top);
            a.lse[row] = nan                                    ? NAN
                         : top == INFINITY || top == -INFINITY ? top
                                                                : float(double(top) + std::log(double(total)));
            if (a.k) top_ids(x, a.size, cell + row * cells, width, a.k, a.ids + row * a.k);
        }
    });
    __builtin_free(block);
    __builtin_free(cell);
}

void sum_exp(const SumExpArgs& a) {
    const int64_t blocks = (a.size + BLOCK - 1) / BLOCK;
    double* sums = (double*)__builtin_malloc(sizeof(double) * size_t(a.rows * blocks + 1));
    parallel(a.rows * blocks, 1, a.rows * a.size * 8, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; item++) {
            const int64_t row = item / blocks, from = item % blocks * BLOCK;
            const int64_t to = from + BLOCK < a.size ? from + BLOCK : a.size;
            sums[item] = block_sum_exp_double(a.x + row * a.x_stride + from, to - from,
                                              a.shift[row], a.temperature);
        }
    });
    for (int64_t row = 0; row < a.rows; row++) {
        double total = 0.0;
        for (int64_t b = 0; b < blocks; b++) total += sums[row * blocks + b];
        a.sum[row] = total;
    }
    __builtin_free(sums);
}

namespace {

// Takes the experts of all but the best groups out of the choice, by a negative probability. A
// group is as good as its best expert.
void keep_groups(const RouteArgs& a, float* p, float* best) {
    const int64_t size = a.experts / a.groups;
    for (int64_t g = 0; g < a.groups; g++) {
        best[g] = p[g * size];
        for (int64_t e = 1; e < size; e++)
            if (p[g * size + e] > best[g]) best[g] = p[g * size + e];
    }
    for (int64_t t = 0; t < a.top_groups; t++) {
        int64_t top = 0;
        while (best[top] < 0.0f) top++;  // already chosen
        for (int64_t g = top + 1; g < a.groups; g++)
            if (best[g] > best[top]) top = g;
        best[top] = -1.0f;
    }
    for (int64_t e = 0; e < a.experts; e++)
        if (!(best[e / size] < 0.0f)) p[e] = -1.0f;
}

}  // namespace

void route(const RouteArgs& a) {
    const int64_t padded = (a.experts + LANES - 1) / LANES * LANES;
    parallel(a.rows, 8, a.rows * a.experts * (8 + a.top), [&](int64_t begin, int64_t end) {
        float* p = (float*)scratch(size_t(padded + a.groups) * sizeof(float));
        for (int64_t row = begin; row < end; row++) {
            const float* x = a.x + row * a.x_stride;
            float shift = x[0];
            for (int64_t i = 1; i < a.experts; i++) shift = x[i] > shift ? x[i] : shift;
            F16 total = zero();
            for (int64_t i = 0; i < padded; i += LANES) {
                const int n = a.experts - i < LANES ? int(a.experts - i) : LANES;
                F16 v = select(first_lanes(n), load_first(x + i, n), splat(-INFINITY));
                v = exp(v - splat(shift));
                store(p + i, v);
                total = total + v;
            }
            const float norm = sum(total);
            if (a.top_groups < a.groups) keep_groups(a, p, p + padded);
            int32_t* ids = a.ids + row * a.top;
            float* weights = a.weights + row * a.top;
            float chosen = 0.0f;
            for (int64_t t = 0; t < a.top; t++) {
                int64_t best = 0;
                while (p[best] < 0.0f) best++;  // already chosen, or of another group
                for (int64_t e = best + 1; e < a.experts; e++)
                    if (p[e] > p[best]) best = e;
                ids[t] = int32_t(best);
                weights[t] = p[best] / norm;
                chosen = chosen + weights[t];
                p[best] = -1.0f;
            }
            if (a.normalize)
                for (int64_t t = 0; t < a.top; t++) weights[t] = weights[t] / chosen;
        }
    });
}

}  // namespace HASTEN_LEVEL
}  // namespace hasten
