// y[r, n] = bias[n] + sum over k ascending of x[r, k] * w[n, k], each step one fma; then + add.
//
// Every output has one accumulator and one order, so neither the number of rows nor any choice
// below (tile sizes, blocks of k, threads) can change a bit; they only change the speed.
#include "gate.h"

namespace hasten {
namespace HASTEN_LEVEL {
namespace {

// Register tiles: up to MOST_ROWS rows by at most panels_of(rows) panels, so that the accumulators,
// a vector of weights for each panel and one input fit the registers. Few rows are one tile, which
// reads a group of panels once, from front to back.
#if defined(__AVX512F__)
constexpr int MOST_ROWS = 6;
constexpr int panels_of(int) { return 4; }
#else
constexpr int MOST_ROWS = 6;
constexpr int panels_of(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
#endif

// Several tiles read a group again and again: it is cut into blocks of k that stay in the
// first-level cache, and while they read one block the next one is fetched.
constexpr int64_t K_BLOCK = 128;

// How far ahead of the reader weights are fetched where they are read once.
constexpr int64_t AHEAD = 2048;

// With this many row tiles, bfloat16 weights of a block are widened once for all of them.
constexpr int64_t WIDEN_FOR = 4;

// Rows whose accumulators are kept at a time.
constexpr int64_t ROWS = 1024;

constexpr int64_t COLUMNS = GROUP * PANEL;  // accumulators of a row

// neighbours in k that stand side by side
template <class W>
constexpr int DEPTH = sizeof(W) == 2 ? 2 : 1;

struct Tile {
    const float* x;
    int64_t x_stride;
    const void* w;    // first panel, at the first k
    int64_t step;     // elements from one k (of bf16: two) to the next
    int64_t k;        // steps to make
    float* acc;       // [rows, COLUMNS] accumulators between blocks and at the end
    bool first;       // start from 0, not from what is in acc
    // What will be read next is fetched on the way, `lines` (at most 4) cache lines a step: evenly,
    // since a core has few buffers for lines under way and a burst would hold up the loads.
    const char* next;
    int64_t lines;
};

// the even ones, or the odd ones, of 32 numbers
template <int ODD>
HASTEN_INLINE F16 load_half(const bf16* p) {
#if defined(__AVX512F__)
    const __m512i both = _mm512_loadu_si512(p);
    const __m512i half = ODD ? _mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000)))
                             : _mm512_slli_epi32(both, 16);
    return {_mm512_castsi512_ps(half)};
#elif defined(__AVX2__)
    const __m256i lo = _mm256_loadu_si256((const __m256i*)p);
    const __m256i hi = _mm256_loadu_si256((const __m256i*)(p + 16));
    const __m256i upper = _mm256_set1_epi32(int(0xffff0000));
    if (ODD)
        return {_mm256_castsi256_ps(_mm256_and_si256(lo, upper)),
                _mm256_castsi256_ps(_mm256_and_si256(hi, upper))};
    return {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
#else
    F16 half;
    for (int i = 0; i < LANES; i++) half.v[i] = widen(p[2 * i + ODD]);
    return half;
#endif
}

// neighbour D of a step
template <int D>
HASTEN_INLINE F16 load_weight(const float* w) {
    return load(w);
}
template <int D>
HASTEN_INLINE F16 load_weight(const bf16* w) {
    return load_half<D>(w);
}

// one k: neighbour D of the step at w
template <int D, class W, int R, int P>
HASTEN_INLINE void accumulate(F16 (&acc)[R][P], const W* w, const float* x, int64_t x_stride) {
    F16 weight[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) weight[p] = load_weight<D>(w + p * PANEL * DEPTH<W>);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
        const F16 value = splat(x[r * x_stride + D]);
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) acc[r][p] = fma(value, weight[p], acc[r][p]);
    }
}

template <class W, int R, int P>
void tile(const Tile& t) {
    F16 acc[R][P];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++)
            acc[r][p] = t.first ? zero() : load(t.acc + r * COLUMNS + p * PANEL);
    const W* w = (const W*)t.w;
    const float* x = t.x;
    const int64_t x_stride = t.x_stride, step = t.step;
    const float* const end = x + t.k / DEPTH<W> * DEPTH<W>;
    const char* next = t.next;
    const int64_t lines = t.lines;
#pragma GCC unroll 1
    for (; x < end; w += step, x += DEPTH<W>) {
        if (lines) {
            __builtin_prefetch(next, 0, 2);
            if (P > 1 && lines > 1) __builtin_prefetch(next + 64, 0, 2);
            if (P > 2 && lines > 2) {
                __builtin_prefetch(next + 128, 0, 2);
                __builtin_prefetch(next + 192, 0, 2);
            }
            next += lines * 64;
        }
        accumulate<0>(acc, w, x, x_stride);
        if constexpr (DEPTH<W> == 2) accumulate<1>(acc, w, x, x_stride);
    }
    if (t.k % DEPTH<W>) accumulate<0>(acc, w, x, x_stride);  // the last one of an odd number
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) store(t.acc + r * COLUMNS + p * PANEL, acc[r][p]);
}

typedef void (*TileFunction)(const Tile&);

// tiles[rows][panels], filled for rows <= MOST_ROWS and panels <= panels_of(rows)
template <class W>
struct Tiles {
    TileFunction at[MOST_ROWS + 1][GROUP + 1] = {};

    constexpr Tiles() { fill<1, 1>(); }

    template <int R, int P>
    constexpr void fill() {
        at[R][P] = tile<W, R, P>;
        if constexpr (P < panels_of(R))
            fill<R, P + 1>();
        else if constexpr (R < MOST_ROWS)
            fill<R + 1, 1>();
    }
};

template <class W>
constexpr Tiles<W> TILES;

// what one thread computes, start to end
struct Item {
    const LinearPart* part;
    int64_t panel, panels;  // the first one and how many, all of one group
    int64_t row, rows;
};

void finish(const LinearArgs& a, const Item& item, const float* acc) {
    const LinearPart& part = *item.part;
    for (int64_t row = item.row; row < item.row + item.rows; row++, acc += COLUMNS) {
        float* out = part.out + row * a.out_stride;
        const float* add = part.add ? part.add + row * a.add_stride : nullptr;
        for (int64_t p = 0; p < item.panels; p++) {
            if (a.gate == Gate::none) {
                const int64_t column = (item.panel + p) * PANEL;
                const int n = int(a.n - column < PANEL ? a.n - column : PANEL);
                F16 y = load(acc + p * PANEL);
                if (part.bias) y = y + load_first(part.bias + column, n);
                if (add) y = y + load_first(add + column, n);
                store_first(out + column, y, n);
            } else if (p % 2 == 0) {
                const int64_t half = a.n / 2, column = (item.panel + p) / 2 * PANEL;
                const int n = int(half - column < PANEL ? half - column : PANEL);
                F16 gate = load(acc + p * PANEL), up = load(acc + (p + 1) * PANEL);
                if (part.bias) {
                    gate = gate + load_first(part.bias + column, n);
                    up = up + load_first(part.bias + half + column, n);
                }
                store_first(out + column, gated(a.gate, gate, up), n);
            }
        }
    }
}

template <class W>
void compute(const LinearArgs& a, const Item& item, int64_t panels) {
    const LinearPart& part = *item.part;
    const int64_t tiles = (item.rows + MOST_ROWS - 1) / MOST_ROWS;
    const int64_t most_panels = panels_of(int((item.rows + tiles - 1) / tiles));
    const int64_t passes = tiles * ((item.panels + most_panels - 1) / most_panels);
    const bool widened = sizeof(W) == 2 && tiles >= WIDEN_FOR;
    const int64_t k_block = passes == 1 ? a.k : K_BLOCK;

    float* acc = (float*)scratch(size_t((item.rows + K_BLOCK) * COLUMNS) * sizeof(float));
    float* wide = acc + item.rows * COLUMNS;

    const int64_t group = item.panel / GROUP * GROUP;
    const int64_t in_group = panels - group < GROUP ? panels - group : GROUP;
    const int64_t depth = DEPTH<W>, step = in_group * PANEL * depth;  // elements a step of k
    const int64_t whole_k = (a.k + depth - 1) / depth * depth;
    const W* w = (const W*)part.w + group * PANEL * whole_k + (item.panel - group) * PANEL * depth;
    const int64_t lines = in_group * PANEL * depth * int64_t(sizeof(W)) / 64;  // of a step

    int64_t k = 0;
    do {
        const int64_t steps = a.k - k < k_block ? a.k - k : k_block;
        if (widened)
            for (int64_t i = 0; i < steps; i += depth)
                for (int64_t p = 0; p < item.panels; p++) {
                    const bf16* pair = (const bf16*)w + i / depth * step + p * PANEL * depth;
                    store(wide + i * COLUMNS + p * PANEL, load_half<0>(pair));
                    store(wide + (i + 1) * COLUMNS + p * PANEL, load_half<1>(pair));
                }
        Tile t;
        t.x_stride = a.x_stride;
        t.step = widened ? COLUMNS : step;
        t.k = steps;
        t.first = k == 0;
        const W* following = w + (steps + depth - 1) / depth * step;
        int64_t pass = 0;
        for (int64_t i = 0; i < tiles; i++) {
            // row tiles of nearly equal size
            const int64_t row = item.rows * i / tiles;
            const int rows = int(item.rows * (i + 1) / tiles - row);
            t.x = part.x + (item.row + row) * a.x_stride + k;
            for (int64_t p = 0; p < item.panels; p += most_panels, pass++) {
                const int count = int(item.panels - p < most_panels ? item.panels - p : most_panels);
                t.acc = acc + row * COLUMNS + p * PANEL;
                // what is read next, of which each pass fetches a part
                const int64_t begin = lines * pass / passes;
                t.lines = lines * (pass + 1) / passes - begin;
                t.next = passes == 1 ? (const char*)w + AHEAD
                                     : (const char*)following + begin * (K_BLOCK / depth) * 64;
                if (widened) {
                    t.w = wide + p * PANEL;
                    TILES<float>.at[rows][count](t);
                } else {
                    t.w = w + p * PANEL * depth;
                    TILES<W>.at[rows][count](t);
                }
            }
        }
        w = following;
        k += steps;
    } while (k < a.k);
    finish(a, item, acc);
}

}  // namespace

void linear(const LinearArgs& a, const LinearPart* parts, int64_t count) {
    const int64_t half = (a.n / 2 + PANEL - 1) / PANEL;
    const int64_t panels = a.gate == Gate::none ? (a.n + PANEL - 1) / PANEL : 2 * half;
    const int64_t groups = (panels + GROUP - 1) / GROUP;
    int64_t rows = 0;
    for (int64_t p = 0; p < count; p++) rows += parts[p].rows;
    // few groups are cut, so that all threads get their share
    const bool cut = count * groups < 4 * num_threads();
    const int64_t item_panels = cut ? GROUP / 2 : GROUP;
    const int64_t items = cut ? (panels + item_panels - 1) / item_panels : groups;
    // a range of at least 16 KiB of weights, so that threads rarely meet at a counter
    const int64_t bytes = item_panels * PANEL * a.k * (a.w_bf16 ? 2 : 4);
    const int64_t grain = bytes ? 1 + (16 << 10) / bytes : 1;

    parallel(count * items, grain, rows * a.k * a.n, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            Item item;
            item.part = parts + i / items;
            item.panel = i % items * item_panels;
            item.panels = panels - item.panel < item_panels ? panels - item.panel : item_panels;
            for (item.row = 0; item.row < item.part->rows; item.row += ROWS) {
                const int64_t rest = item.part->rows - item.row;
                item.rows = rest < ROWS ? rest : ROWS;
                a.w_bf16 ? compute<bf16>(a, item, panels) : compute<float>(a, item, panels);
            }
        }
    });
}

}  // namespace HASTEN_LEVEL
}  // namespace hasten
