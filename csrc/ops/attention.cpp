// Attention of ragged rows over paged keys and values, with the bits fixed by rule:
//
//   chunk c holds the positions [64 c, 64 c + 64); inside it, everything is indexed by the lane
//   "position % 64", never by where the key is stored:
//     dot = fma over d ascending of q[d] k[d]; int8 pages: k[d] is the code, dot *= key scale
//     score = scale * dot, then the soft cap
//     m_c = max of the visible scores, p = exp(score - m_c), 0 where invisible
//     l_c = sum of p by a fixed tree over the 64 lanes
//     o_c = fma over visible positions ascending of p v; int8 pages: of (p * value scale) code
//   chunks are folded in ascending order: with m' = max(m, m_c), a = exp(m - m'),
//   b = exp(m_c - m'): l = fma(l_c, b, l a), o = fma(o_c, b, o a); the output is o / l.
//   Keys that are stored before the rotation are rotated as `append` would have (codes as if they
//   were the key), with the angles of their position.
//
// A tile is a few rows of one sequence times the query heads of one KV head. Its queries share
// loads of keys and values, nothing else, so how rows are grouped cannot change a bit. The chunks of
// a tile may be shared out to threads: each then leaves its (m_c, l_c, o_c), folded afterwards.
//
// Sums are taken over floats. Pages of another type, keys to be rotated and values that lie in keys
// are first widened to a copy, chunk by chunk; so are the path nodes of a tree row, key by key.
#include <cmath>
#include <vector>

#include "ops.h"

namespace hasten {
namespace HASTEN_LEVEL {
namespace {

// Register tile: queries that share the loads of keys or values, pages or vectors of a value row.
#if defined(__AVX512F__)
constexpr int QUERIES = 4, WIDTH = 4;
#else
constexpr int QUERIES = 2, WIDTH = 2;
#endif
constexpr int CHUNK_PAGES = CHUNK / PAGE;
constexpr int64_t TILE_QUERIES = 128;

// Pages of keys with the lane at which their scores go.
struct KeyPages {
    const float* k[CHUNK_PAGES];
    int lane[CHUNK_PAGES];
};

// The bytes of the next chunk, which the loops over this one fetch line by line: as many as memory
// delivers meanwhile. A loop takes two runs of lines and fetches one of each in every iteration.
class Fetch {
  public:
    struct Run {
        const char* from;
        int64_t step;  // 0 when there is nothing left: the same line over and over
    };

    void clear(const void* any) { count_ = next_ = 0, idle_ = (const char*)any; }
    void add(const char* from, int64_t bytes) { region_[count_++] = {from, bytes}; }
    bool empty() const { return next_ == count_; }

    Run take(int64_t lines) {
        if (empty()) return {idle_, 0};
        Region& it = region_[next_];
        const char* from = it.from;
        it.from += lines * LINE, it.bytes -= lines * LINE;
        next_ += it.bytes <= 0;
        return {from, LINE};
    }

  private:
    static constexpr int64_t LINE = 64;
    struct Region {
        const char* from;
        int64_t bytes;
    };
    Region region_[2 * CHUNK_PAGES];
    int count_ = 0, next_ = 0;
    const char* idle_ = nullptr;
};
typedef Fetch::Run Run;

// scores[i][lane + j] = sum over d ascending of q[i][d] * k[d][j], for P pages from `first`
template <int Q, int P, bool FETCH>
void dot_pages(const float* const* q, const KeyPages& pages, int first, int64_t dim,
               Fetch& fetch, float* const* scores) {
    const float* const* k = pages.k + first;
    F16 acc[Q][P];
#pragma GCC unroll 4
    for (int i = 0; i < Q; i++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) acc[i][p] = zero();
    Run one{}, two{};
    if (FETCH) one = fetch.take(dim), two = fetch.take(dim);
    for (int64_t d = 0; d < dim; d++) {
        if (FETCH) {
            __builtin_prefetch(one.from + d * one.step, 0, 2);
            __builtin_prefetch(two.from + d * two.step, 0, 2);
        }
        F16 key[P];
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) key[p] = load(k[p] + d * PAGE);
#pragma GCC unroll 4
        for (int i = 0; i < Q; i++) {
            const F16 value = splat(q[i][d]);
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) acc[i][p] = fma(value, key[p], acc[i][p]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < Q; i++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) store(scores[i] + pages.lane[first + p], acc[i][p]);
}

template <int Q, bool FETCH>
void dot_pages_of(const float* const* q, const KeyPages& pages, int count, int64_t dim,
                  Fetch& fetch, float* const* scores) {
    for (int first = 0; first < count;) {
        const int n = count - first < WIDTH ? count - first : WIDTH;
        switch (n) {
            case 1: dot_pages<Q, 1, FETCH>(q, pages, first, dim, fetch, scores); break;
            case 2: dot_pages<Q, 2, FETCH>(q, pages, first, dim, fetch, scores); break;
#if defined(__AVX512F__)
            case 3: dot_pages<Q, 3, FETCH>(q, pages, first, dim, fetch, scores); break;
            case 4: dot_pages<Q, 4, FETCH>(q, pages, first, dim, fetch, scores); break;
#endif
        }
        first += n;
    }
}

template <bool FETCH>
void dot_some(const float* const* q, int queries, const KeyPages& pages, int count, int64_t dim,
              Fetch& fetch, float* const* scores) {
    switch (queries) {
        case 1: dot_pages_of<1, FETCH>(q, pages, count, dim, fetch, scores); break;
        case 2: dot_pages_of<2, FETCH>(q, pages, count, dim, fetch, scores); break;
#if defined(__AVX512F__)
        case 3: dot_pages_of<3, FETCH>(q, pages, count, dim, fetch, scores); break;
        case 4: dot_pages_of<4, FETCH>(q, pages, count, dim, fetch, scores); break;
#endif
    }
}

void dot_queries(const float* const* q, int queries, const KeyPages& pages, int count, int64_t dim,
                 Fetch& fetch, float* const* scores) {
    for (int i = 0; i < queries; i += QUERIES) {
        const int n = queries - i < QUERIES ? queries - i : QUERIES;
        if (fetch.empty())
            dot_some<false>(q + i, n, pages, count, dim, fetch, scores + i);
        else
            dot_some<true>(q + i, n, pages, count, dim, fetch, scores + i);
    }
}

// One query: (m, l, o) over the chunks folded so far, and those of the present chunk.
struct Query {
    const float* q;
    float* scores;  // [64], then the weights p
    float* o;       // [width of a value]
    float m, l;
    float m_c, l_c;
    float keep, add;  // a and b of the fold
};

// o[i] = fma(o_c, add[i], o[i] * keep[i]), or o_c alone without FOLD, for `W` vectors of the value
// row from `offset`; o_c = sum over visible lanes ascending of p[i][lane] * v[lane]
template <int Q, int W, bool FOLD>
void add_values(Query* const* q, const float* const* v, uint64_t visible, int64_t offset,
                Fetch& fetch) {
    F16 acc[Q][W];
#pragma GCC unroll 4
    for (int i = 0; i < Q; i++)
#pragma GCC unroll 4
        for (int w = 0; w < W; w++) acc[i][w] = zero();
    const float* p[Q];
#pragma GCC unroll 4
    for (int i = 0; i < Q; i++) p[i] = q[i]->scores;
    Run one = fetch.take(CHUNK), two = fetch.take(CHUNK);
    for (uint64_t rest = visible; rest; rest &= rest - 1) {
        __builtin_prefetch(one.from, 0, 2);
        __builtin_prefetch(two.from, 0, 2);
        one.from += one.step, two.from += two.step;
        const int lane = __builtin_ctzll(rest);
        const float* row = v[lane] + offset;
        F16 value[W];
#pragma GCC unroll 4
        for (int w = 0; w < W; w++) value[w] = load(row + w * LANES);
#pragma GCC unroll 4
        for (int i = 0; i < Q; i++) {
            const F16 weight = splat(p[i][lane]);
#pragma GCC unroll 4
            for (int w = 0; w < W; w++) acc[i][w] = fma(weight, value[w], acc[i][w]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < Q; i++) {
        const F16 keep = splat(q[i]->keep), add = splat(q[i]->add);
        float* o = q[i]->o + offset;
#pragma GCC unroll 4
        for (int w = 0; w < W; w++)
            store(o + w * LANES,
                  FOLD ? fma(acc[i][w], add, load(o + w * LANES) * keep) : acc[i][w]);
    }
}

template <int Q, bool FOLD>
void add_values_of(Query* const* q, const float* const* v, uint64_t visible, int64_t width,
                   Fetch& fetch) {
    for (int64_t offset = 0; offset < width;) {
        const int64_t left = (width - offset) / LANES;
        const int n = left < WIDTH ? int(left) : WIDTH;
        switch (n) {
            case 1: add_values<Q, 1, FOLD>(q, v, visible, offset, fetch); break;
            case 2: add_values<Q, 2, FOLD>(q, v, visible, offset, fetch); break;
#if defined(__AVX512F__)
            case 3: add_values<Q, 3, FOLD>(q, v, visible, offset, fetch); break;
            case 4: add_values<Q, 4, FOLD>(q, v, visible, offset, fetch); break;
#endif
        }
        offset += n * LANES;
    }
}

template <bool FOLD>
void add_values_queries(Query* const* q, int queries, const float* const* v, uint64_t visible,
                        int64_t width, Fetch& fetch) {
    switch (queries) {
        case 1: add_values_of<1, FOLD>(q, v, visible, width, fetch); break;
        case 2: add_values_of<2, FOLD>(q, v, visible, width, fetch); break;
#if defined(__AVX512F__)
        case 3: add_values_of<3, FOLD>(q, v, visible, width, fetch); break;
        case 4: add_values_of<4, FOLD>(q, v, visible, width, fetch); break;
#endif
    }
}

// Factors on the scores and weights of a chunk, lane by lane; null: none.
struct Scales {
    const float *key, *value;
};

// Turns the scores of a chunk into weights, with their maximum and sum.
HASTEN_INLINE void weigh(Query& q, uint64_t visible, const Scales& scales, float scale, float cap) {
    F16 s[CHUNK_PAGES];
    F16 top = splat(-INFINITY);
#pragma GCC unroll 4
    for (int j = 0; j < CHUNK_PAGES; j++) {
        F16 x = load(q.scores + j * LANES);
        if (scales.key) x = x * load(scales.key + j * LANES);
        x = x * splat(scale);
        if (cap > 0.0f) x = splat(cap) * tanh(x / splat(cap));
        s[j] = select(uint32_t(visible >> (j * LANES)) & 0xffff, x, splat(-INFINITY));
        top = max(top, s[j]);
    }
    q.m_c = max(top);
    // 0 where nothing was seen, since -inf - -inf is NaN
    const F16 shift = splat(q.m_c == -INFINITY ? 0.0f : q.m_c);
#pragma GCC unroll 4
    for (int j = 0; j < CHUNK_PAGES; j++) {
        s[j] = exp(s[j] - shift);
        store(q.scores + j * LANES,
              scales.value ? s[j] * load(scales.value + j * LANES) : s[j]);
    }
    q.l_c = sum((s[0] + s[1]) + (s[2] + s[3]));
}

// Folds m and l of up to LANES queries and leaves the factors with which o is folded.
void fold(Query* const* q, int queries) {
    float m[LANES] = {}, m_c[LANES] = {}, l[LANES] = {}, l_c[LANES] = {};
    for (int i = 0; i < queries; i++) {
        m[i] = q[i]->m, m_c[i] = q[i]->m_c;
        l[i] = q[i]->l, l_c[i] = q[i]->l_c;
    }
    const F16 old = load(m), now = load(m_c), top = max(old, now);
    const F16 shift = select(less(top, splat(-3.40282347e38f)), zero(), top);  // as in weigh
    const F16 keep = exp(old - shift), add = exp(now - shift);
    const F16 total = fma(load(l_c), add, load(l) * keep);
    float a[LANES], b[LANES];
    store(m, top), store(l, total), store(a, keep), store(b, add);
    for (int i = 0; i < queries; i++) {
        q[i]->m = m[i], q[i]->l = l[i];
        q[i]->keep = a[i], q[i]->add = b[i];
    }
}

// bits of the positions [from, to) within the chunk that starts at `start`
HASTEN_INLINE uint64_t lanes_between(int64_t from, int64_t to, int64_t start) {
    int64_t lo = from - start, hi = to - start;
    lo = lo < 0 ? 0 : lo;
    hi = hi > CHUNK ? CHUNK : hi;
    if (lo >= hi) return 0;
    const uint64_t below = hi == CHUNK ? ~uint64_t(0) : (uint64_t(1) << hi) - 1;
    return below & ~((uint64_t(1) << lo) - 1);
}

// What one row sees. Path: its visible slots beyond `base`, at consecutive positions.
struct Row {
    int64_t base, window_from, sinks;
    int64_t path_from, path_size;  // position of the first path node, number of nodes
    int32_t* path;                 // slots of the nodes
    uint64_t committed, tree;      // lanes visible in the present chunk

    int64_t end() const { return base > path_from + path_size ? base : path_from + path_size; }

    uint64_t in_window(int64_t start) const {
        return lanes_between(window_from, INT64_MAX, start) | lanes_between(0, sinks, start);
    }
};

struct Scratch {
    char* next;
    template <class U>
    U* take(int64_t count) {
        U* result = (U*)next;
        next += (count * int64_t(sizeof(U)) + 63) / 64 * 64;
        return result;
    }
};

// Where tiles of which the chunks are shared out leave (m_c, l_c, o_c).
struct Partials {
    float* data;  // null: fold at once
    int64_t chunks, width;

    // o [width], m, l, and 1 if the query saw something in the chunk
    float* of(int64_t query, int64_t chunk) const {
        return data + (query * chunks + chunk) * (width + LANES);
    }
};

void widen_page(const void* from, Stored type, int64_t count, float* to) {
    switch (type) {
        case Stored::f32: memcpy(to, from, size_t(count) * 4); break;
        case Stored::bf16:
            for (int64_t i = 0; i < count; i += LANES) store(to + i, load((const bf16*)from + i));
            break;
        case Stored::i8:
            for (int64_t i = 0; i < count; i += LANES)
                store(to + i, load((const int8_t*)from + i));
            break;
    }
}

// A key of a page: to[d * step] = from[d * PAGE]
void widen_key(const void* from, int64_t at, Stored type, int64_t dim, float* to, int64_t step) {
    switch (type) {
        case Stored::f32:
            for (int64_t d = 0; d < dim; d++) to[d * step] = ((const float*)from)[d * PAGE + at];
            break;
        case Stored::bf16:
            for (int64_t d = 0; d < dim; d++)
                to[d * step] = widen(((const bf16*)from)[d * PAGE + at]);
            break;
        case Stored::i8:
            for (int64_t d = 0; d < dim; d++)
                to[d * step] = widen(((const int8_t*)from)[d * PAGE + at]);
            break;
    }
}

// Rows of one sequence times the query heads of a KV head.
class Tile {
  public:
    Tile(const AttentionArgs& args, const Partials& partials, int64_t first_row, int64_t rows,
         int64_t kv_head)
        : a(args), g(args.pages), partials(partials), first_row(first_row), rows(rows),
          group(a.q_heads / (g.groups * g.heads)), first_head(kv_head * group),
          queries(rows * group), width((g.v_dim + LANES - 1) / LANES * LANES),
          table(g.table + (a.table_row[first_row] * g.groups + kv_head / g.heads) * g.blocks),
          k_head((const char*)g.k + kv_head % g.heads * g.k_page()),
          v_head((const char*)g.v + kv_head % g.heads * g.v_page()) {
        const int64_t path_room = a.words * 64;
        const int64_t key_room = CHUNK * g.dim, value_room = CHUNK * width;
        const int64_t bytes = rows * int64_t(sizeof(Row)) + rows * path_room * 4 +
                              queries * int64_t(sizeof(Query) + 2 * sizeof(void*)) +
                              queries * (CHUNK + width) * 4 + group * CHUNK * 4 + group * 8 +
                              2 * CHUNK * 8 + 2 * (key_room + value_room + 2 * CHUNK) * 4 +
                              64 * 20;
        Scratch memory{(char*)scratch(size_t(bytes))};
        row = memory.take<Row>(rows);
        query = memory.take<Query>(queries);
        q_of = memory.take<const float*>(queries);
        scores_of = memory.take<float*>(queries);
        float* scores = memory.take<float>(queries * CHUNK);
        float* outputs = memory.take<float>(queries * width);
        float* node_scores = memory.take<float>(group * CHUNK);
        node_scores_of = memory.take<float*>(group);
        values = memory.take<const float*>(CHUNK);
        row_values = memory.take<const float*>(CHUNK);
        key_copy = memory.take<float>(key_room), node_keys = memory.take<float>(key_room);
        value_copy = memory.take<float>(value_room), node_values = memory.take<float>(value_room);
        key_scale = memory.take<float>(CHUNK), value_scale = memory.take<float>(CHUNK);
        row_key_scale = memory.take<float>(CHUNK), row_value_scale = memory.take<float>(CHUNK);
        int32_t* paths = memory.take<int32_t>(rows * path_room);

        end = 0;
        for (int64_t r = 0; r < rows; r++) {
            const int64_t index = first_row + r, position = a.positions[index];
            Row& it = row[r];
            it.base = a.base[index];
            it.window_from = a.window > 0 && position >= a.window ? position - a.window + 1 : 0;
            it.sinks = a.sinks;
            it.path = paths + r * path_room;
            it.path_size = 0;
            for (int64_t w = 0; w < a.words; w++)
                for (uint64_t bits = a.mask[index * a.words + w]; bits; bits &= bits - 1)
                    it.path[it.path_size++] = int32_t(it.base + w * 64 + __builtin_ctzll(bits));
            it.path_from = it.path_size ? position - it.path_size + 1 : 0;
            end = it.end() > end ? it.end() : end;
        }
        for (int64_t i = 0; i < queries; i++) {
            Query& it = query[i];
            it.q = a.q + (first_row + i / group) * a.q_stride + (first_head + i % group) * g.dim;
            it.scores = scores + i * CHUNK;
            it.o = outputs + i * width;
            it.m = -INFINITY;
            it.l = 0.0f;
            for (int64_t d = 0; d < width; d += LANES) store(it.o + d, zero());
        }
        for (int64_t i = 0; i < group; i++) node_scores_of[i] = node_scores + i * CHUNK;
        fetch.clear(query);
    }

    // Chunks [from, to) of all; false if a page is missing.
    bool run(int64_t from, int64_t to) {
        for (int64_t chunk = from; chunk < to && chunk * CHUNK < end; chunk++)
            if (!run_chunk(chunk)) return false;
        return true;
    }

    // Folds what `run` over all chunks left.
    void fold_partials() {
        for (int64_t first = 0; first < queries; first += LANES)
            for (int64_t chunk = 0; chunk * CHUNK < end; chunk++) {
                Query* seen[LANES];
                const float* part[LANES];
                int n = 0;
                for (int64_t i = first; i < queries && i < first + LANES; i++) {
                    const float* from = partials.of(index_of(i), chunk);
                    if (from[width + 2] == 0.0f) continue;
                    query[i].m_c = from[width], query[i].l_c = from[width + 1];
                    part[n] = from, seen[n++] = &query[i];
                }
                if (n) fold(seen, n);
                for (int i = 0; i < n; i++)
                    for (int64_t d = 0; d < width; d += LANES) {
                        float* o = seen[i]->o + d;
                        store(o, fma(load(part[i] + d), splat(seen[i]->add),
                                     load(o) * splat(seen[i]->keep)));
                    }
            }
    }

    void write() const {
        for (int64_t i = 0; i < queries; i++) {
            const Query& it = query[i];
            const int64_t index = index_of(i);
            float* out = a.out + index * g.v_dim;
            const bool empty = it.l == 0.0f;
            for (int64_t d = 0; d < g.v_dim; d += LANES) {
                const int n = g.v_dim - d < LANES ? int(g.v_dim - d) : LANES;
                store_first(out + d, empty ? zero() : load(it.o + d) / splat(it.l), n);
            }
            if (a.lse)
                a.lse[index] = empty ? -INFINITY : float(double(it.m) + std::log(double(it.l)));
        }
    }

  private:
    int64_t index_of(int64_t i) const {
        return (first_row + i / group) * a.q_heads + first_head + i % group;
    }

    // The page of a block, or -1 after it was reported as missing for row `r`.
    int64_t page_of(int64_t block, int64_t r) const {
        const int64_t page = table[block];
        if (page >= 0 && page < g.pages) return page;
        __atomic_store_n(a.missing, 1 + (first_row + r) * g.blocks + block, __ATOMIC_RELAXED);
        return -1;
    }
    const char* keys_of(int64_t page) const { return k_head + page * g.heads * g.k_page(); }
    const char* values_of(int64_t page) const { return v_head + page * g.heads * g.v_page(); }
    const float* scales_of(int64_t page) const {
        return (const float*)(keys_of(page) + g.dim * PAGE);
    }
    const float* angles(const float* table, int64_t position) const {
        return table + position / PAGE * a.half * PAGE + position % PAGE;
    }

    bool run_chunk(int64_t chunk) {
        const int64_t start = chunk * CHUNK;
        uint64_t committed = 0, any = 0;
        int active = 0;
        for (int64_t r = 0; r < rows; r++) {
            Row& it = row[r];
            const uint64_t window = it.in_window(start);
            it.committed = lanes_between(0, it.base, start) & window;
            it.tree = lanes_between(it.path_from, it.path_from + it.path_size, start) & window;
            committed |= it.committed;
            any |= it.committed | it.tree;
            if (it.committed)
                for (int64_t i = r * group; i < (r + 1) * group; i++) {
                    q_of[active] = query[i].q;
                    scores_of[active++] = query[i].scores;
                }
        }
        if (partials.data)
            for (int64_t i = 0; i < queries; i++) {
                const Row& it = row[i / group];
                partials.of(index_of(i), chunk)[width + 2] = it.committed | it.tree ? 1.0f : 0.0f;
            }
        if (!any) return true;
        if (committed && !score_committed(start, committed, active)) return false;
        for (int i = 0; i < CHUNK; i++) staged[i] = -1;
        for (int64_t r = 0; r < rows;) {
            const Row& it = row[r];
            const uint64_t visible = it.committed | it.tree;
            if (!visible) {
                r++;
                continue;
            }
            int64_t same = 1;  // rows that see the same keys and can share the loads of values
            if (it.tree) {
                if (!score_path(start, r)) return false;
                add(chunk, r, 1, visible, row_values, {row_key_scale, row_value_scale});
            } else {
                while (r + same < rows && !row[r + same].tree && row[r + same].committed == visible)
                    same++;
                add(chunk, r, same, visible, values, {key_scale, value_scale});
            }
            r += same;
        }
        return true;
    }

    // Committed keys: slot == position, so a page fills PAGE lanes.
    bool score_committed(int64_t start, uint64_t committed, int active) {
        KeyPages pages;
        int count = 0;
        fetch_chunk(start / PAGE + CHUNK_PAGES);
        for (int j = 0; j < CHUNK_PAGES; j++) {
            if (!(committed >> (j * PAGE) & 0xffff)) continue;
            const int64_t block = start / PAGE + j, page = page_of(block, 0);
            if (page < 0) return false;
            const int64_t lane = j * PAGE;
            const float* k = widened_keys(page, block, key_copy + lane * g.dim);
            widened_values(page, k, lane);
            if (g.type == Stored::i8) {
                memcpy(key_scale + lane, scales_of(page), PAGE * 4);
                memcpy(value_scale + lane, scales_of(page) + (g.padded ? PAGE : 0), PAGE * 4);
            }
            pages.k[count] = k;
            pages.lane[count++] = int(lane);
        }
        dot_queries(q_of, active, pages, count, g.dim, fetch, scores_of);
        return true;
    }

    // What is fetched from now on: the pages of the blocks from `block`.
    void fetch_chunk(int64_t block) {
        fetch.clear(query);
        const int64_t to = block + CHUNK_PAGES < g.blocks ? block + CHUNK_PAGES : g.blocks;
        for (; block < to && block * PAGE < end; block++) {
            const int64_t page = table[block];
            if (page < 0 || page >= g.pages) continue;
            fetch.add(keys_of(page), g.k_page());
            if (g.padded) fetch.add(values_of(page), g.v_page());
        }
    }

    // A page of keys as floats, rotated: itself, or a copy.
    const float* widened_keys(int64_t page, int64_t block, float* copy) const {
        const char* keys = keys_of(page);
        if (g.type == Stored::f32 && !a.cos) return (const float*)keys;
        widen_page(keys, g.type, g.dim * PAGE, copy);
        if (a.cos) {
            const float *cos = angles(a.cos, block * PAGE), *sin = angles(a.sin, block * PAGE);
            float* other = copy + a.half * PAGE;
            for (int64_t j = 0; j < a.half * PAGE; j += LANES) {
                const F16 x = load(copy + j), y = load(other + j);
                const F16 c = load(cos + j), s = load(sin + j);
                store(copy + j, fma(x, c, y * (s * splat(-1.0f))));
                store(other + j, fma(y, c, x * s));
            }
        }
        return copy;
    }

    // Points values[lane..] at rows of floats: those of the page, or copies.
    void widened_values(int64_t page, const float* keys, int64_t lane) {
        const float* from;
        float* copy = value_copy + lane * width;
        if (g.padded == 0) {
            values_in_keys(keys, copy);
            from = copy;
        } else if (g.type == Stored::f32) {
            from = (const float*)values_of(page);
        } else {
            widen_page(values_of(page), g.type, PAGE * g.padded, copy);
            from = copy;
        }
        for (int i = 0; i < PAGE; i++) values[lane + i] = from + i * width;
    }

    // out[lane][d] = k[dim - v_dim + d][lane] for the keys of a page; the padding is zero
    void values_in_keys(const float* k, float* out) const {
        const int64_t from = g.dim - g.v_dim;
        for (int64_t d = 0; d < width; d += LANES) {
            F16 part[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                part[i] = d + i < g.v_dim ? load(k + (from + d + i) * PAGE) : zero();
            transpose(part);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) store(out + i * width + d, part[i]);
        }
    }

    // Path nodes of row `r` in the chunk: each is copied to the lane of its position, then scored
    // like a page. Rows before may have left the same node there.
    bool score_path(int64_t start, int64_t r) {
        const Row& it = row[r];
        memcpy(row_values, values, CHUNK * sizeof(*values));
        if (g.type == Stored::i8) {
            memcpy(row_key_scale, key_scale, CHUNK * 4);
            memcpy(row_value_scale, value_scale, CHUNK * 4);
        }
        for (uint64_t bits = it.tree; bits; bits &= bits - 1) {
            const int lane = __builtin_ctzll(bits);
            const int64_t slot = it.path[start + lane - it.path_from];
            const int64_t page = page_of(slot / PAGE, r), at = slot % PAGE;
            if (page < 0) return false;
            if (staged[lane] != slot) {
                staged[lane] = slot;
                copy_node(page, at, start + lane, lane);
            }
            row_values[lane] = node_values + lane * width;
            if (g.type == Stored::i8) {
                row_key_scale[lane] = scales_of(page)[at];
                row_value_scale[lane] = scales_of(page)[(g.padded ? PAGE : 0) + at];
            }
        }
        KeyPages pages;
        int count = 0;
        for (int j = 0; j < CHUNK_PAGES; j++)
            if (it.tree >> (j * PAGE) & 0xffff) {
                pages.k[count] = node_keys + j * PAGE * g.dim;
                pages.lane[count++] = j * PAGE;
            }
        for (int64_t i = 0; i < group; i++) q_of[i] = query[r * group + i].q;
        dot_queries(q_of, int(group), pages, count, g.dim, fetch, node_scores_of);
        for (int64_t i = 0; i < group; i++)
            for (int j = 0; j < count; j++) {
                float* scores = query[r * group + i].scores + pages.lane[j];
                const uint32_t nodes = uint32_t(it.tree >> pages.lane[j]) & 0xffff;
                store(scores, select(nodes, load(node_scores_of[i] + pages.lane[j]), load(scores)));
            }
        return true;
    }

    void copy_node(int64_t page, int64_t at, int64_t position, int lane) const {
        float* key = node_keys + lane / PAGE * PAGE * g.dim + lane % PAGE;
        widen_key(keys_of(page), at, g.type, g.dim, key, PAGE);
        if (a.cos) {
            const float *cos = angles(a.cos, position), *sin = angles(a.sin, position);
            for (int64_t j = 0; j < a.half; j++) {
                float &x = key[j * PAGE], &y = key[(j + a.half) * PAGE];
                const float c = cos[j * PAGE], s = sin[j * PAGE], old = x;
                x = __builtin_fmaf(old, c, -(y * s));
                y = __builtin_fmaf(y, c, old * s);
            }
        }
        float* value = node_values + lane * width;
        if (g.padded) {
            widen_page(values_of(page) + at * g.padded * g.item(), g.type, g.padded, value);
        } else {
            for (int64_t d = 0; d < g.v_dim; d++) value[d] = key[(g.dim - g.v_dim + d) * PAGE];
            for (int64_t d = g.v_dim; d < width; d++) value[d] = 0.0f;
        }
    }

    // Weighs the scores of the rows [r, r + count), which see the same keys, and adds the values.
    void add(int64_t chunk, int64_t r, int64_t count, uint64_t visible, const float* const* v,
             Scales scales) {
        if (g.type != Stored::i8) scales = {nullptr, nullptr};
        const int64_t to = (r + count) * group;
        for (int64_t first = r * group; first < to; first += LANES) {
            const int n = to - first < LANES ? int(to - first) : LANES;
            Query* these[LANES];
            for (int i = 0; i < n; i++) {
                these[i] = &query[first + i];
                weigh(*these[i], visible, scales, a.scale, a.softcap);
            }
            if (partials.data) {
                for (int i = 0; i < n; i++) {
                    float* part = partials.of(index_of(first + i), chunk);
                    these[i]->o = part;
                    part[width] = these[i]->m_c, part[width + 1] = these[i]->l_c;
                }
            } else {
                fold(these, n);
            }
            for (int i = 0; i < n; i += QUERIES) {
                const int some = n - i < QUERIES ? n - i : QUERIES;
                if (partials.data)
                    add_values_queries<false>(these + i, some, v, visible, width, fetch);
                else
                    add_values_queries<true>(these + i, some, v, visible, width, fetch);
            }
        }
    }

    const AttentionArgs& a;
    const Pages& g;
    const Partials& partials;
    const int64_t first_row, rows, group, first_head, queries, width;
    const int32_t* table;
    const char *k_head, *v_head;
    int64_t end;  // of the positions that some row sees
    Fetch fetch;

    Row* row;
    Query* query;
    const float** q_of;  // of the queries that are scored together
    float** scores_of;
    float** node_scores_of;
    const float **values, **row_values;   // rows of values by lane: committed ones, those of a row
    float *key_copy, *value_copy;         // committed keys and values as floats
    float *node_keys, *node_values;       // path nodes at the lanes of their positions ...
    int64_t staged[CHUNK];                // ... and the slots that they were copied from
    float *key_scale, *value_scale;       // by lane, committed
    float *row_key_scale, *row_value_scale;
};

thread_local std::vector<float> partial_memory;

}  // namespace

void attention(const AttentionArgs& a) {
    const Pages& g = a.pages;
    const int64_t kv_heads = g.groups * g.heads, threads = num_threads();
    const int64_t width = (g.v_dim + LANES - 1) / LANES * LANES;
    if (a.rows == 0 || a.q_heads == 0) return;

    // tiles: [start[t], start[t + 1]), large where there is work for all threads nevertheless
    int64_t tile_rows = TILE_QUERIES * kv_heads / a.q_heads;
    while (tile_rows > 16 && a.rows * kv_heads < 4 * threads * tile_rows) tile_rows /= 2;
    if (tile_rows < 1) tile_rows = 1;
    std::vector<int64_t> start;
    for (int64_t i = 0; i < a.rows; i++)
        if (i == 0 || a.table_row[i] != a.table_row[i - 1] || i - start.back() == tile_rows)
            start.push_back(i);
    const int64_t tiles = int64_t(start.size());
    start.push_back(a.rows);

    // chunks are shared out where tiles alone would leave threads idle
    const int64_t chunks = (a.end + CHUNK - 1) / CHUNK, items = kv_heads * tiles;
    int64_t spans = 1;
    if (items < 4 * threads && items % threads && chunks > 1)
        spans = chunks < threads ? chunks : threads;
    Partials partials{nullptr, chunks, width};
    if (spans > 1) {
        const size_t size = size_t(a.rows * a.q_heads * chunks * (width + LANES));
        if (partial_memory.size() < size) partial_memory.resize(size);
        partials.data = partial_memory.data();
    }
    // all tiles of a head after each other: their keys stay in the second-level cache
    parallel(items * spans, 1, a.work, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; item++) {
            const int64_t span = item % spans, t = item / spans % tiles;
            Tile tile(a, partials, start[t], start[t + 1] - start[t], item / spans / tiles);
            if (!tile.run(chunks * span / spans, chunks * (span + 1) / spans)) return;
            if (spans == 1) tile.write();
        }
    });
    if (spans == 1 || __atomic_load_n(a.missing, __ATOMIC_RELAXED)) return;
    const int64_t work = a.rows * a.q_heads * chunks * width;
    parallel(items, 1, work, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; item++) {
            const int64_t t = item % tiles;
            Tile tile(a, partials, start[t], start[t + 1] - start[t], item / tiles);
            tile.fold_partials();
            tile.write();
        }
    });
}

}  // namespace HASTEN_LEVEL
}  // namespace hasten
