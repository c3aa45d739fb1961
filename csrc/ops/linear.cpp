// y[r, n] = bias[n] + sum over k ascending of x[r, k] * w[n, k], each step one fma.
//
// Every output has one accumulator and one order, so neither the number of rows nor any choice
// below (tile sizes, blocks of k, threads) can change a bit; they only change the speed.
#include "ops.h"

namespace hasten {
namespace HASTEN_LEVEL {
namespace {

// Register tiles: `rows` rows by at most panels_of(rows) panels of 16 outputs, so that the
// accumulators, one vector of weights for each panel and one input fit the registers. Up to
// ONE_PASS rows are one tile, and weights stream from memory once; more rows are cut into tiles
// of at most MANY.
#if defined(__AVX512F__)
constexpr int ONE_PASS = 12, MANY = 8, MOST_PANELS = 8;
constexpr int panels_of(int rows) { return rows == 1 ? 8 : rows <= 6 ? 4 : rows <= 8 ? 3 : 2; }
#else
constexpr int ONE_PASS = 6, MANY = 6, MOST_PANELS = 4;
constexpr int panels_of(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
#endif

// Several row tiles read a panel group again and again: it is cut into blocks of k that stay in
// the first-level cache. Between blocks the accumulators wait in the output.
constexpr int64_t K_BLOCK = 128;

// With this many row tiles, bfloat16 weights of a block are widened once for all of them.
constexpr int64_t WIDEN_FOR = 4;

struct Tile {
    const float* x;
    int64_t x_stride;
    const void* w;          // first panel, at the first k
    int64_t panel_stride;   // elements from panel to panel
    int64_t k;              // steps to make
    float* out;             // first output of the tile
    int64_t out_stride;
    int columns;            // outputs that exist, <= 16 * panels
    const float* bias;      // at the first output of the tile, or null
    bool first;             // start from 0, not from what is in out
    bool stream;            // weights come from memory: fetch them ahead
};

template <class W, int R, int P, bool STREAM>
void tile_loop(const Tile& t) {
    F16 acc[R][P];
    const bool full = t.columns == P * LANES;
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int p = 0; p < P; p++) {
            const int n = t.columns - p * LANES;
            if (t.first)
                acc[r][p] = zero();
            else
                acc[r][p] = load_first(t.out + r * t.out_stride + p * LANES, n);
        }
    const W* w = (const W*)t.w;
    const float* x = t.x;
    for (int64_t k = 0; k < t.k; k++) {
        F16 weight[P];
#pragma GCC unroll 8
        for (int p = 0; p < P; p++) {
            const W* at = w + p * t.panel_stride;
            weight[p] = load(at);
            if (STREAM) __builtin_prefetch(at + 2048 / sizeof(W), 0, 3);
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            const F16 value = splat(x[r * t.x_stride]);
#pragma GCC unroll 8
            for (int p = 0; p < P; p++) acc[r][p] = fma(value, weight[p], acc[r][p]);
        }
        w += LANES;
        x += 1;
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int p = 0; p < P; p++) {
            const int n = t.columns - p * LANES;
            F16 y = acc[r][p];
            if (t.bias) y = y + load_first(t.bias + p * LANES, n);
            if (full)
                store(t.out + r * t.out_stride + p * LANES, y);
            else
                store_first(t.out + r * t.out_stride + p * LANES, y, n);
        }
}

template <class W, int R, int P>
void tile(const Tile& t) {
    if (t.stream)
        tile_loop<W, R, P, true>(t);
    else
        tile_loop<W, R, P, false>(t);
}

typedef void (*TileFunction)(const Tile&);

// tiles[rows][panels], filled for rows <= ONE_PASS and panels <= panels_of(rows)
template <class W>
struct Tiles {
    TileFunction at[ONE_PASS + 1][MOST_PANELS + 1] = {};

    constexpr Tiles() { fill<1, 1>(); }

    template <int R, int P>
    constexpr void fill() {
        at[R][P] = tile<W, R, P>;
        if constexpr (P < panels_of(R))
            fill<R, P + 1>();
        else if constexpr (R < ONE_PASS)
            fill<R + 1, 1>();
    }
};

template <class W>
constexpr Tiles<W> TILES;

template <class W>
void linear_of(const LinearArgs& a) {
    const int64_t panels = (a.n + LANES - 1) / LANES;
    const bool one_pass = a.rows <= ONE_PASS;
    const int64_t row_tiles = one_pass ? 1 : (a.rows + MANY - 1) / MANY;
    const int group = panels_of(one_pass ? int(a.rows) : MANY);
    const int64_t groups = (panels + group - 1) / group;
    const int64_t k_block = one_pass ? a.k : K_BLOCK;
    const int64_t panel_stride = a.k * LANES;
    const bool widen_block = sizeof(W) == 2 && row_tiles >= WIDEN_FOR;
    // a range of at least 64 KiB of weights, so that threads rarely meet at the counter
    const int64_t group_bytes = group * panel_stride * int64_t(sizeof(W));
    const int64_t grain = group_bytes ? 1 + (64 << 10) / group_bytes : 1;

    const int64_t work = a.parts * a.rows * a.k * a.n;
    parallel(a.parts * groups, grain, work, [&](int64_t begin, int64_t end) {
        float* wide = nullptr;
        if (widen_block) wide = (float*)scratch(size_t(group * K_BLOCK * LANES) * sizeof(float));
        for (int64_t item = begin; item < end; item++) {
            const int64_t part = item / groups, panel = item % groups * group;
            const W* weights = (const W*)a.w + part * panels * panel_stride;
            const float* x = a.x + part * a.x_part;
            float* out = a.out + part * a.out_part;
            const int count = int(panels - panel < group ? panels - panel : group);
            const int64_t column = panel * LANES;
            const int64_t columns = a.n - column < count * LANES ? a.n - column : count * LANES;
            for (int64_t k = 0; k < a.k || k == 0; k += k_block) {
                const int64_t steps = a.k - k < k_block ? a.k - k : k_block;
                const W* block = weights + panel * panel_stride + k * LANES;
                for (int p = 0; wide && p < count; p++)
                    for (int64_t i = 0; i < steps; i++)
                        store(wide + (p * K_BLOCK + i) * LANES,
                              load(block + p * panel_stride + i * LANES));
                const bool last = k + steps >= a.k;
                Tile t;
                t.w = wide ? (const void*)wide : (const void*)block;
                t.panel_stride = wide ? K_BLOCK * LANES : panel_stride;
                t.x_stride = a.x_stride;
                t.k = steps;
                t.out_stride = a.out_stride;
                t.columns = int(columns);
                t.bias = last && a.bias ? a.bias + part * a.n + column : nullptr;
                t.first = k == 0;
                t.stream = one_pass;
                for (int64_t i = 0; i < row_tiles; i++) {
                    // row tiles of nearly equal size
                    const int64_t row = a.rows * i / row_tiles;
                    const int rows = int(a.rows * (i + 1) / row_tiles - row);
                    t.x = x + row * a.x_stride + k;
                    t.out = out + row * a.out_stride + column;
                    (wide ? TILES<float>.at : TILES<W>.at)[rows][count](t);
                }
                if (a.k == 0) break;
            }
        }
    });
}

}  // namespace

void linear(const LinearArgs& a) {
    if (a.rows == 0 || a.n == 0) return;
    if (a.w_bf16)
        linear_of<bf16>(a);
    else
        linear_of<float>(a);
}

}  // namespace HASTEN_LEVEL
}  // namespace hasten
