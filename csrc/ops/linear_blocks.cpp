// Linear layers directly on the blocks of GGUF files (blocks.h has their order in memory).
//
// A row of activations becomes 8-bit codes with one scale sx for 32 inputs (quantize.h). For each
// output, groups of inputs are folded in ascending order, from 0:
//     Q8_0, Q4_0  y = fma(float(s), sx * d, y)           s = sum of x code * (code - zero)
//     Q6_K        y = fma(float(s), sx * (d * scale), y) groups of 16
//     Q4_K        y = fma(float(s), sx * (d * scale), y), then
//                 y = fma(sx * float(sum of x codes), -(dmin * minimum), y)
// then + bias, then + add, or with a gate act(first) * second. s is an exact integer, every product of floats is rounded once, and
// d * scale is exact. Nothing below can change a bit: neither the instruction set nor who computes
// a strip, how rows are cut into tiles or how far a span is expanded at a time.
#include "../blocks.h"

#include <vector>

#include "dot.h"
#include "gate.h"
#include "quantize.h"

namespace hasten {
namespace HASTEN_LEVEL {

// --- products of codes below 64, one byte each; those of 8 bits are a matter of ByteDot (dot.h)

#if defined(__AVX512F__)

HASTEN_INLINE F16 load_bytes(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
HASTEN_INLINE F16 load_bytes(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}

// vpmaddubsw adds products in pairs, which must fit 16 bits: 2 * 63 * 127 does
struct SmallDot {
    typedef __m512i Weights, Inputs;
    static constexpr int MOST_ROWS = 4;
    static constexpr int panels_of(int) { return 4; }

    static HASTEN_INLINE Weights weights(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static HASTEN_INLINE Inputs inputs(const int8_t* p) { return _mm512_set1_epi32(four(p)); }
    static HASTEN_INLINE void add(I16& sum, Weights w, Inputs x) {
        const __m512i pairs = _mm512_maddubs_epi16(w, x);
        sum = sum + I16{_mm512_madd_epi16(pairs, _mm512_set1_epi16(1))};
    }
};

#elif defined(__AVX2__)

HASTEN_INLINE F16 load_bytes(const uint8_t* p) {
    return to_float(I16{_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)),
                        _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))});
}
HASTEN_INLINE F16 load_bytes(const int8_t* p) {
    return to_float(I16{_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)),
                        _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))});
}

// vpmaddubsw adds products in pairs, which must fit 16 bits: 2 * 63 * 127 does
struct SmallDot {
    struct Weights {
        __m256i lo, hi;
    };
    typedef __m256i Inputs;
    static constexpr int MOST_ROWS = 4;
    static constexpr int panels_of(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

    static HASTEN_INLINE Weights weights(const uint8_t* p) { return {load32(p), load32(p + 32)}; }
    static HASTEN_INLINE Inputs inputs(const int8_t* p) { return _mm256_set1_epi32(four(p)); }
    static HASTEN_INLINE void add(I16& sum, Weights w, Inputs x) {
        const __m256i one = _mm256_set1_epi16(1);
        const __m256i lo = _mm256_maddubs_epi16(w.lo, x), hi = _mm256_maddubs_epi16(w.hi, x);
        sum = sum + I16{_mm256_madd_epi16(lo, one), _mm256_madd_epi16(hi, one)};
    }
};

#else

template <class T>
HASTEN_INLINE F16 load_bytes(const T* p) {
    F16 r;
    for (int i = 0; i < LANES; i++) r.v[i] = float(p[i]);
    return r;
}

struct SmallDot {
    typedef const uint8_t* Weights;
    typedef const int8_t* Inputs;
    static constexpr int MOST_ROWS = 2;
    static constexpr int panels_of(int) { return 1; }

    static HASTEN_INLINE Weights weights(const uint8_t* p) { return p; }
    static HASTEN_INLINE Inputs inputs(const int8_t* p) { return p; }
    static HASTEN_INLINE void add(I16& sum, Weights w, Inputs x) {
        for (int j = 0; j < LANES; j++)
            for (int i = 0; i < 4; i++) sum.v[j] += w[4 * j + i] * x[i];
    }
};

#endif

namespace {

// --- a span of a strip, ready to be multiplied

constexpr int SUBS = SPAN / SUB;
constexpr int SUB_CODES = STRIP_PANELS * 512;  // bytes of a group of 32, one byte a code

struct Span {
    alignas(64) uint8_t codes[SUBS * SUB_CODES];                 // [sub][panel][step][16][4]
    alignas(64) float scale[2 * SUBS][STRIP_PANELS][LANES];      // by groups of 32, or 16 (Q6_K)
    alignas(64) float low[SUBS][STRIP_PANELS][LANES];            // -(dmin * minimum) of Q4_K
};

constexpr int halves_of(Block b) { return b == Block::q6_k ? 2 : 1; }

template <Block B>
void expand_scales(const uint8_t* header, int subs, Span& span) {
    for (int p = 0; p < STRIP_PANELS; p++, header += header_bytes(B, subs)) {
        if (B == Block::q8_0 || B == Block::q4_0) {
            for (int sub = 0; sub < subs; sub++)
                store(span.scale[sub][p], load_half((const uint16_t*)(header + 32 * sub)));
        } else if (B == Block::q6_k) {
            const F16 d = load_half((const uint16_t*)header);
            for (int i = 0; i < 16; i++)
                store(span.scale[i][p], d * load_bytes((const int8_t*)header + 32 + 16 * i));
        } else {
            // scales and minima of six bits: four and four of them, then halves of the others
            // whose upper two bits are those of the first
            alignas(64) uint8_t scale[128], minimum[128];
            const uint8_t *a = header + 64, *b = header + 128, *c = header + 192;
            for (int i = 0; i < 64; i++) scale[i] = a[i] & 63;
            for (int i = 0; i < 64; i++) minimum[i] = b[i] & 63;
            for (int i = 0; i < 64; i++) scale[64 + i] = uint8_t((c[i] & 15) | (a[i] >> 2 & 48));
            for (int i = 0; i < 64; i++) minimum[64 + i] = uint8_t(c[i] >> 4 | (b[i] >> 2 & 48));
            const F16 d = load_half((const uint16_t*)header);
            const F16 dmin = zero() - load_half((const uint16_t*)(header + 32));
            for (int sub = 0; sub < SUBS; sub++) {
                store(span.scale[sub][p], d * load_bytes(scale + 16 * sub));
                store(span.low[sub][p], dmin * load_bytes(minimum + 16 * sub));
            }
        }
    }
}

// The codes of a group of 32 to one byte each.
template <Block B>
void expand_codes(const uint8_t* __restrict from, uint8_t* __restrict to) {
    for (int p = 0; p < STRIP_PANELS; p++, from += code_bytes(B), to += 512) {
        if (B == Block::q6_k) {
            for (int t = 0; t < 4; t++) {
                const uint8_t *both = from + t * 64, *high = from + (4 + t / 2) * 64;
                for (int i = 0; i < 64; i++) {
                    const uint8_t upper = t % 2 ? high[i] : uint8_t(high[i] << 4);
                    const uint8_t next = t % 2 ? uint8_t(high[i] >> 2) : uint8_t(high[i] << 2);
                    to[(2 * t) * 64 + i] = uint8_t((both[i] & 15) | (upper & 48));
                    to[(2 * t + 1) * 64 + i] = uint8_t(both[i] >> 4 | (next & 48));
                }
            }
        } else {
            for (int t = 0; t < 4; t++)
                for (int i = 0; i < 64; i++) {
                    to[(2 * t) * 64 + i] = from[t * 64 + i] & 15;
                    to[(2 * t + 1) * 64 + i] = from[t * 64 + i] >> 4;
                }
        }
    }
}

// --- activations

// A span of a row.
struct alignas(64) RowSpan {
    int8_t codes[SPAN];
    float scale[SUBS];
    float sum[SUBS];          // scale * float(sum of codes)
    int32_t start[2 * SUBS];  // what takes the zero out, by groups of 32, or 16 (Q6_K)
};

// what a sum begins with, times the sum of the activation codes
template <Block B, class Dot>
constexpr int32_t factor() {
    if constexpr (B == Block::q8_0)
        return Dot::FACTOR;
    else
        return -block_zero(B);
}

// A row into its spans, which are `step` apart.
template <Block B, class Dot>
void quantize(const float* x, int64_t k, RowSpan* to, int64_t step) {
    constexpr int HALVES = halves_of(B), SIZE = SUB / HALVES;
    for (int64_t i = 0; i < k; i += SUB) {
        RowSpan& span = to[i / SPAN * step];
        const int sub = int(i % SPAN / SUB);
        int8_t* codes = span.codes + sub * SUB;
        int32_t sum;
        quantize_block(x + i, SUB, 1, codes, span.scale + sub, &sum);
        span.sum[sub] = span.scale[sub] * float(sum);
        for (int h = 0; h < HALVES; h++) {
            if (HALVES > 1) {
                sum = 0;
                for (int j = 0; j < SIZE; j++) sum += codes[h * SIZE + j];
            }
            span.start[sub * HALVES + h] = factor<B, Dot>() * sum;
        }
    }
}

// --- tiles

struct Tile {
    const RowSpan* x;      // the first row
    const uint8_t* codes;  // of group `first`
    const Span* span;
    float* y;        // [rows][64]
    int first, end;  // groups of 32
};

template <Block B, class Dot, int R>
void tile(const Tile& t) {
    constexpr int HALVES = halves_of(B), STEPS = 8 / HALVES, P = Dot::panels_of(R);
    const uint8_t* codes = t.codes;
    for (int group = t.first * HALVES; group < t.end * HALVES; group++, codes += STEPS * 64) {
        if (HALVES == 2 && group % 2 == 0 && group > t.first * 2) codes += SUB_CODES - 512;
        if (HALVES == 1 && group > t.first) codes += SUB_CODES - 512;
        const int sub = group / HALVES;
        for (int panel = 0; panel < STRIP_PANELS; panel += P) {
            I16 sum[R][P];
#pragma GCC unroll 6
            for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                for (int p = 0; p < P; p++) sum[r][p] = splat(&t.x[r].start[group]);
#pragma GCC unroll 8
            for (int s = 0; s < STEPS; s++) {
                typename Dot::Weights w[P];
#pragma GCC unroll 4
                for (int p = 0; p < P; p++) w[p] = Dot::weights(codes + (panel + p) * 512 + s * 64);
#pragma GCC unroll 6
                for (int r = 0; r < R; r++) {
                    const typename Dot::Inputs x =
                        Dot::inputs(t.x[r].codes + group * (SUB / HALVES) + 4 * s);
#pragma GCC unroll 4
                    for (int p = 0; p < P; p++) Dot::add(sum[r][p], w[p], x);
                }
            }
#pragma GCC unroll 6
            for (int r = 0; r < R; r++) {
                const F16 scale = splat(t.x[r].scale[sub]);
#pragma GCC unroll 4
                for (int p = 0; p < P; p++) {
                    float* at = t.y + r * STRIP_OUTPUTS + (panel + p) * LANES;
                    F16 y = load(at);
                    y = fma(to_float(sum[r][p]), scale * load(t.span->scale[group][panel + p]), y);
                    if (B == Block::q4_k)
                        y = fma(splat(t.x[r].sum[sub]), load(t.span->low[sub][panel + p]), y);
                    store(at, y);
                }
            }
        }
    }
}

typedef void (*TileFunction)(const Tile&);

// at[rows], filled from 1 on
template <Block B, class Dot>
struct Tiles {
    TileFunction at[Dot::MOST_ROWS + 1] = {};

    constexpr Tiles() { fill<1>(); }

    template <int R>
    constexpr void fill() {
        at[R] = tile<B, Dot, R>;
        if constexpr (R < Dot::MOST_ROWS) fill<R + 1>();
    }
};

template <Block B, class Dot>
constexpr Tiles<B, Dot> TILES;

// So many rows take each group of 32 as soon as it is expanded, so that memory is read without a
// pause; more rows take a whole span, so that calls are few.
constexpr int64_t FEW_ROWS = 12;
// How far ahead weights are fetched, in bytes.
constexpr int64_t AHEAD = 4096;
// Rows that go through at a time. Their sums and, for the usual k, their codes stay in the
// second-level cache while every strip passes by.
constexpr int64_t MOST_ROWS = 128, X_BYTES = 1 << 20;

// y [rows][64] = the products of quantized rows and a strip.
template <Block B, class Dot>
void strip_sums(const uint8_t* strip, int64_t k, const RowSpan* x, int64_t x_step, int64_t rows,
                Span& span, float* y) {
    memset(y, 0, size_t(rows) * STRIP_OUTPUTS * sizeof(float));
    const int64_t tiles = (rows + Dot::MOST_ROWS - 1) / Dot::MOST_ROWS;
    const bool few = rows <= FEW_ROWS;
    for (int64_t from = 0; from < k; from += SPAN, x += x_step) {
        const int subs = int((k - from < SPAN ? k - from : SPAN) / SUB);
        const int64_t header = STRIP_PANELS * header_bytes(B, subs);
        const int64_t step = header / subs + STRIP_PANELS * code_bytes(B);
        expand_scales<B>(strip, subs, span);
        for (int sub = 0; sub < subs; sub++) {
            for (int64_t i = 0; i < step; i += 64)
                __builtin_prefetch(strip + sub * step + i + AHEAD, 0, 3);
            const uint8_t* codes = strip + header + sub * STRIP_PANELS * code_bytes(B);
            if (B != Block::q8_0) {
                uint8_t* to = span.codes + (few ? 0 : sub * SUB_CODES);
                expand_codes<B>(codes, to);
                codes = to;
            }
            if (!few && sub < subs - 1) continue;
            Tile t;
            t.span = &span;
            t.first = few ? sub : 0, t.end = sub + 1;
            t.codes = few ? codes : codes - sub * SUB_CODES;
            for (int64_t i = 0; i < tiles; i++) {
                const int64_t row = rows * i / tiles;  // tiles of nearly equal size
                t.x = x + row;
                t.y = y + row * STRIP_OUTPUTS;
                TILES<B, Dot>.at[rows * (i + 1) / tiles - row](t);
            }
        }
        strip += subs * step;
    }
}

// y [rows][64] of a strip to the outputs of rows `row` and following.
void finish(const BlocksArgs& a, const LinearPart& part, int64_t row, int64_t rows, int64_t strip,
            const float* y) {
    const int64_t half = a.n / 2, panel = strip * STRIP_PANELS;
    for (int64_t r = 0; r < rows; r++, row++, y += STRIP_OUTPUTS) {
        float* out = part.out + row * a.out_stride;
        if (a.gate == Gate::none) {
            for (int p = 0; p < STRIP_PANELS; p++) {
                const int64_t column = (panel + p) * LANES;
                if (column >= a.n) break;
                const int n = a.n - column < LANES ? int(a.n - column) : LANES;
                F16 v = load(y + p * LANES);
                if (part.bias) v = v + load_first(part.bias + column, n);
                if (part.add) v = v + load_first(part.add + row * a.add_stride + column, n);
                store_first(out + column, v, n);
            }
        } else {
            for (int p = 0; p < STRIP_PANELS; p += 2) {
                const int64_t column = (panel + p) / 2 * LANES;
                if (column >= half) break;
                const int n = half - column < LANES ? int(half - column) : LANES;
                F16 first = load(y + p * LANES), second = load(y + (p + 1) * LANES);
                if (part.bias) {
                    first = first + load_first(part.bias + column, n);
                    second = second + load_first(part.bias + half + column, n);
                }
                store_first(out + column, gated(a.gate, first, second), n);
            }
        }
    }
}

template <Block B, class Dot>
void linear_of(const BlocksArgs& a, const LinearPart* parts, int64_t count) {
    const bool gate = a.gate != Gate::none;
    const int64_t strips = strips_of(a.n, gate), strip_bytes = STRIP_OUTPUTS * row_bytes(B, a.k);
    const int64_t spans = (a.k + SPAN - 1) / SPAN;
    int64_t longest = 0;
    for (int64_t i = 0; i < count; i++)
        longest = parts[i].rows > longest ? parts[i].rows : longest;
    int64_t most = X_BYTES / (spans * int64_t(sizeof(RowSpan)));
    most = most < 32 ? 32 : most > MOST_ROWS ? MOST_ROWS : most;
    const int64_t rounds = (longest + most - 1) / most;

    std::vector<int64_t> before(size_t(count) + 1);  // rows of this round in earlier parts
    for (int64_t round = 0; round < rounds; round++) {
        const auto begin_of = [&](const LinearPart& part) { return part.rows * round / rounds; };
        const auto end_of = [&](const LinearPart& part) { return part.rows * (round + 1) / rounds; };
        for (int64_t i = 0; i < count; i++)
            before[i + 1] = before[i] + end_of(parts[i]) - begin_of(parts[i]);
        const int64_t rows = before[count];
        RowSpan* x = (RowSpan*)scratch(size_t(rows * spans) * sizeof(RowSpan));
        parallel(rows, 4, rows * a.k, [&](int64_t begin, int64_t end) {
            int64_t i = 0;
            for (int64_t row = begin; row < end; row++) {
                while (row >= before[i + 1]) i++;
                const int64_t at = begin_of(parts[i]) + row - before[i];
                quantize<B, Dot>(parts[i].x + at * a.x_stride, a.k, x + row, rows);
            }
        });
        // a range of at least 64 KiB of weights, so that threads rarely meet at the counter
        const int64_t grain = 1 + (64 << 10) / (strip_bytes + 1);
        parallel(count * strips, grain, rows * a.k * a.n, [&](int64_t begin, int64_t end) {
            Span span;
            alignas(64) float y[MOST_ROWS * STRIP_OUTPUTS];
            for (int64_t item = begin; item < end; item++) {
                const LinearPart& part = parts[item / strips];
                const int64_t strip = item % strips, row = begin_of(part);
                const int64_t some = end_of(part) - row;
                if (some == 0) continue;
                strip_sums<B, Dot>((const uint8_t*)part.w + strip * strip_bytes, a.k,
                                   x + before[item / strips], rows, some, span, y);
                finish(a, part, row, some, strip, y);
            }
        });
    }
}

template <class Small, class Byte>
void linear_kinds(const BlocksArgs& a, const LinearPart* parts, int64_t count) {
    switch (a.kind) {
        case Block::q8_0: return linear_of<Block::q8_0, Byte>(a, parts, count);
        case Block::q4_0: return linear_of<Block::q4_0, Small>(a, parts, count);
        case Block::q4_k: return linear_of<Block::q4_k, Small>(a, parts, count);
        case Block::q6_k: return linear_of<Block::q6_k, Small>(a, parts, count);
    }
}

}  // namespace

void linear_blocks(const BlocksArgs& a, const LinearPart* parts, int64_t count) {
    linear_kinds<SmallDot, ByteDot>(a, parts, count);
}

#if defined(__AVX512F__)
void linear_blocks_vnni(const BlocksArgs& a, const LinearPart* parts, int64_t count) {
    linear_kinds<ByteDotVnni, ByteDotVnni>(a, parts, count);
}
#endif

}  // namespace HASTEN_LEVEL
}  // namespace hasten
