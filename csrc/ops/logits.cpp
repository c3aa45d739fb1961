// Largest logit and log-sum-exp of a row, and the expert choice of a router.
//
// A row is cut into blocks of fixed size; each block has 16 lanes and a fixed tree, and the blocks
// are folded in ascending order, so that one long row can use several threads.
#include <cmath>

#include "ops.h"

namespace hasten {
namespace HASTEN_LEVEL {
namespace {

constexpr int64_t BLOCK = 8192;

struct Best {
    float value;
    int64_t index;
    bool nan;
};

// the largest value and its lowest index
Best block_max(const float* x, int64_t from, int64_t to) {
    F16 best = splat(-INFINITY);
    uint32_t nan = 0;
    for (int64_t i = from; i < to; i += LANES) {
        const int n = to - i < LANES ? int(to - i) : LANES;
        F16 v = load_first(x + i, n);
        nan |= is_nan(v);
        best = max(best, select(first_lanes(n), v, splat(-INFINITY)));
    }
    Best result = {max(best), from, nan != 0};
    if (!result.nan)
        while (x[result.index] != result.value) result.index++;
    return result;
}

float block_sum_exp(const float* x, int64_t from, int64_t to, float shift) {
    F16 total = zero();
    for (int64_t i = from; i < to; i += LANES) {
        const int n = to - i < LANES ? int(to - i) : LANES;
        F16 v = select(first_lanes(n), load_first(x + i, n), splat(-INFINITY));
        total = total + exp(v - splat(shift));
    }
    return sum(total);
}

}  // namespace

void row_max_lse(const MaxLseArgs& a) {
    const int64_t blocks = (a.size + BLOCK - 1) / BLOCK;
    // an own array: scratch memory belongs to whoever runs a block
    Best* best = (Best*)__builtin_malloc(sizeof(Best) * size_t(a.rows * blocks + 1));
    float* sums = (float*)__builtin_malloc(sizeof(float) * size_t(a.rows * blocks + 1));
    const int64_t work = a.rows * a.size;
    parallel(a.rows * blocks, 1, work / 8, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; item++) {
            const int64_t row = item / blocks, from = item % blocks * BLOCK;
            const int64_t to = from + BLOCK < a.size ? from + BLOCK : a.size;
            best[item] = block_max(a.x + row * a.x_stride, from, to);
        }
    });
    for (int64_t row = 0; row < a.rows; row++) {
        Best all = best[row * blocks];
        for (int64_t b = 1; b < blocks; b++) {
            const Best& next = best[row * blocks + b];
            all.nan = all.nan || next.nan;
            if (next.value > all.value) all = {next.value, next.index, all.nan};
        }
        a.argmax[row] = all.nan ? 0 : all.index;
        a.max[row] = all.nan ? NAN : all.value;
    }
    parallel(a.rows * blocks, 1, work, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; item++) {
            const int64_t row = item / blocks, from = item % blocks * BLOCK;
            const int64_t to = from + BLOCK < a.size ? from + BLOCK : a.size;
            sums[item] = block_sum_exp(a.x + row * a.x_stride, from, to, a.max[row]);
        }
    });
    for (int64_t row = 0; row < a.rows; row++) {
        const float top = a.max[row];
        if (top != top || top == INFINITY || top == -INFINITY) {
            a.lse[row] = top;
            continue;
        }
        float total = sums[row * blocks];
        for (int64_t b = 1; b < blocks; b++) total = total + sums[row * blocks + b];
        a.lse[row] = float(double(top) + std::log(double(total)));
    }
    __builtin_free(best);
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
            const float shift = block_max(x, 0, a.experts).value;
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
