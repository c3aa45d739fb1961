// Attention of ragged rows over paged keys and values, with the bits fixed by rule:
//
//   chunk c holds the positions [64 c, 64 c + 64); inside it, everything is indexed by the lane
//   "position % 64", never by where the key is stored:
//     score = scale * (fma over d ascending of q[d] k[d]), then the soft cap
//     m_c = max of the visible scores, p = exp(score - m_c), 0 where invisible
//     l_c = sum of p by a fixed tree over the 64 lanes
//     o_c = fma over visible positions ascending of p v
//   chunks are folded in ascending order: with m' = max(m, m_c), a = exp(m - m'),
//   b = exp(m_c - m'): l = fma(l_c, b, l a), o = fma(o_c, b, o a); the output is o / l.
//
// A tile is a few rows of one sequence times query heads of one KV head. Its queries share
// loads of keys and values, nothing else, so how rows are grouped cannot change a bit.
//
// Values are rows of their own pages, or the last dimensions of the keys (latent attention). The
// latter are first copied out of the dimension-major pages, chunk by chunk.
#include <cmath>
#include <type_traits>

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

// Pages of keys with the lane at which their scores go, and what is read after them: the values
// of the same pages, then the keys of the next chunk (any page where there is none).
template <class T>
struct KeyPages {
    const T* k[CHUNK_PAGES];
    int lane[CHUNK_PAGES];
    const T *v[CHUNK_PAGES], *next_k[CHUNK_PAGES];
};

// out[lane][d] = k[from + d][lane] for the keys of a page; the padding up to `width` is zero
template <class T>
void values_of_page(const T* k, int64_t from, int64_t dim, int64_t width, float* out) {
    for (int64_t d = 0; d < width; d += LANES) {
        F16 part[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            part[i] = d + i < dim ? load(k + (from + d + i) * PAGE) : zero();
        transpose(part);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) store(out + i * width + d, part[i]);
    }
}

// the same for one key of a page
template <class T>
void value_of_key(const T* k, int64_t from, int64_t dim, int64_t width, float* out) {
    for (int64_t d = 0; d < dim; d++) out[d] = widen(k[(from + d) * PAGE]);
    for (int64_t d = dim; d < width; d++) out[d] = 0.0f;
}

// scores[i][lane + j] = sum over d ascending of q[i][d] * k[d][j], for P pages from `first`
template <class T, int Q, int P, bool FETCH>
void dot_pages(const float* const* q, const KeyPages<T>& pages, int first, int64_t dim,
               float* const* scores) {
    const T* const* k = pages.k + first;
    F16 acc[Q][P];
#pragma GCC unroll 4
    for (int i = 0; i < Q; i++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) acc[i][p] = zero();
    for (int64_t d = 0; d < dim; d++) {
        F16 key[P];
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            key[p] = load(k[p] + d * PAGE);
            if (FETCH) {
                __builtin_prefetch(pages.v[first + p] + d * PAGE, 0, 3);
                __builtin_prefetch(pages.next_k[first + p] + d * PAGE, 0, 2);
            }
        }
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

template <class T, int Q, bool FETCH>
void dot_pages_of(const float* const* q, const KeyPages<T>& pages, int count, int64_t dim,
                  float* const* scores) {
    for (int first = 0; first < count;) {
        const int n = count - first < WIDTH ? count - first : WIDTH;
        switch (n) {
            case 1: dot_pages<T, Q, 1, FETCH>(q, pages, first, dim, scores); break;
            case 2: dot_pages<T, Q, 2, FETCH>(q, pages, first, dim, scores); break;
#if defined(__AVX512F__)
            case 3: dot_pages<T, Q, 3, FETCH>(q, pages, first, dim, scores); break;
            case 4: dot_pages<T, Q, 4, FETCH>(q, pages, first, dim, scores); break;
#endif
        }
        first += n;
    }
}

template <class T, bool FETCH>
void dot_some(const float* const* q, int queries, const KeyPages<T>& pages, int count, int64_t dim,
              float* const* scores) {
    switch (queries) {
        case 1: dot_pages_of<T, 1, FETCH>(q, pages, count, dim, scores); break;
        case 2: dot_pages_of<T, 2, FETCH>(q, pages, count, dim, scores); break;
#if defined(__AVX512F__)
        case 3: dot_pages_of<T, 3, FETCH>(q, pages, count, dim, scores); break;
        case 4: dot_pages_of<T, 4, FETCH>(q, pages, count, dim, scores); break;
#endif
    }
}

// scores of all queries; the first of them fetch what is read next
template <class T>
void dot_queries(const float* const* q, int queries, const KeyPages<T>& pages, int count,
                 int64_t dim, float* const* scores) {
    for (int i = 0; i < queries; i += QUERIES) {
        const int n = queries - i < QUERIES ? queries - i : QUERIES;
        if (i == 0)
            dot_some<T, true>(q, n, pages, count, dim, scores);
        else
            dot_some<T, false>(q + i, n, pages, count, dim, scores + i);
    }
}

// The state of one query: (m, l, o) over the chunks folded so far.
struct Query {
    const float* q;
    float* scores;  // [64], then the weights p
    float* o;       // [width of a value]
    float m, l;
    float keep, add;  // a and b of the fold of the present chunk
};

// o[i] = fma(sum over visible lanes ascending of p[i][lane] * v[lane], add[i], o[i] * keep[i])
// for `W` vectors of the value row, starting at `offset`
template <class T, int Q, int W>
void add_values(Query* const* q, const T* const* v, uint64_t visible, int64_t offset) {
    F16 acc[Q][W];
#pragma GCC unroll 4
    for (int i = 0; i < Q; i++)
#pragma GCC unroll 4
        for (int w = 0; w < W; w++) acc[i][w] = zero();
    for (uint64_t rest = visible; rest; rest &= rest - 1) {
        const int lane = __builtin_ctzll(rest);
        const T* row = v[lane] + offset;
        F16 value[W];
#pragma GCC unroll 4
        for (int w = 0; w < W; w++) value[w] = load(row + w * LANES);
#pragma GCC unroll 4
        for (int i = 0; i < Q; i++) {
            const F16 p = splat(q[i]->scores[lane]);
#pragma GCC unroll 4
            for (int w = 0; w < W; w++) acc[i][w] = fma(p, value[w], acc[i][w]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < Q; i++) {
        const F16 keep = splat(q[i]->keep), add = splat(q[i]->add);
        float* o = q[i]->o + offset;
#pragma GCC unroll 4
        for (int w = 0; w < W; w++)
            store(o + w * LANES, fma(acc[i][w], add, load(o + w * LANES) * keep));
    }
}

template <class T, int Q>
void add_values_of(Query* const* q, const T* const* v, uint64_t visible, int64_t width) {
    for (int64_t offset = 0; offset < width;) {
        const int64_t left = (width - offset) / LANES;
        const int n = left < WIDTH ? int(left) : WIDTH;
        switch (n) {
            case 1: add_values<T, Q, 1>(q, v, visible, offset); break;
            case 2: add_values<T, Q, 2>(q, v, visible, offset); break;
#if defined(__AVX512F__)
            case 3: add_values<T, Q, 3>(q, v, visible, offset); break;
            case 4: add_values<T, Q, 4>(q, v, visible, offset); break;
#endif
        }
        offset += n * LANES;
    }
}

template <class T>
void add_values_queries(Query* const* q, int queries, const T* const* v, uint64_t visible,
                        int64_t width) {
    switch (queries) {
        case 1: add_values_of<T, 1>(q, v, visible, width); break;
        case 2: add_values_of<T, 2>(q, v, visible, width); break;
#if defined(__AVX512F__)
        case 3: add_values_of<T, 3>(q, v, visible, width); break;
        case 4: add_values_of<T, 4>(q, v, visible, width); break;
#endif
    }
}

// what scores are taken relative to: 0 where nothing was seen yet, since -inf - -inf is NaN
HASTEN_INLINE float finite_reference(float m) { return m == -INFINITY ? 0.0f : m; }

HASTEN_INLINE void exp2x(float x, float y, float* ex, float* ey) {
    float pair[LANES] = {x, y};
    store(pair, exp(load(pair)));
    *ex = pair[0];
    *ey = pair[1];
}

// Turns the scores of a chunk into weights and prepares the fold of the query's state.
HASTEN_INLINE void weigh(Query& q, uint64_t visible, float scale, float cap) {
    F16 s[CHUNK_PAGES];
    F16 top = splat(-INFINITY);
#pragma GCC unroll 4
    for (int j = 0; j < CHUNK_PAGES; j++) {
        F16 x = load(q.scores + j * LANES) * splat(scale);
        if (cap > 0.0f) x = splat(cap) * tanh(x / splat(cap));
        s[j] = select(uint32_t(visible >> (j * LANES)) & 0xffff, x, splat(-INFINITY));
        top = max(top, s[j]);
    }
    const float m_c = max(top);
    const F16 shift = splat(finite_reference(m_c));
#pragma GCC unroll 4
    for (int j = 0; j < CHUNK_PAGES; j++) {
        s[j] = exp(s[j] - shift);
        store(q.scores + j * LANES, s[j]);
    }
    const float l_c = sum((s[0] + s[1]) + (s[2] + s[3]));
    const float m = q.m > m_c ? q.m : m_c;
    const float reference = finite_reference(m);
    exp2x(q.m - reference, m_c - reference, &q.keep, &q.add);
    q.l = __builtin_fmaf(l_c, q.add, q.l * q.keep);
    q.m = m;
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
    int64_t position, base, window_from, sinks;
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

// Rows of one sequence times the query heads [first_head, first_head + group) of a KV head.
struct TileOf {
    int64_t first_row, rows, kv_head, first_head, group;
};

template <class T, bool VALUES_IN_KEYS>
void attend_tile(const AttentionArgs& a, const TileOf& tile) {
    typedef std::conditional_t<VALUES_IN_KEYS, float, T> V;
    const Pages& g = a.pages;
    const int64_t first_row = tile.first_row, rows = tile.rows, kv_head = tile.kv_head;
    const int64_t first_head = tile.first_head, group = tile.group, queries = rows * group;
    const int64_t width = (g.v_dim + LANES - 1) / LANES * LANES, v_from = g.dim - g.v_dim;
    const int64_t value_room = VALUES_IN_KEYS ? CHUNK * width : 0;
    const int32_t* table =
        g.table + (a.table_row[first_row] * g.groups + kv_head / g.heads) * g.blocks;
    const int64_t k_page = g.dim * PAGE, v_page = PAGE * g.padded;
    const T* k_head = (const T*)g.k + kv_head % g.heads * k_page;
    const T* v_head = (const T*)g.v + kv_head % g.heads * v_page;

    const int64_t path_room = a.words * 64;
    const int64_t bytes = rows * int64_t(sizeof(Row)) + rows * path_room * 4 +
                          queries * int64_t(sizeof(Query) + 2 * sizeof(void*)) +
                          queries * (CHUNK + width) * 4 + 2 * group * (PAGE * 4 + 8) +
                          2 * CHUNK * 8 + 2 * value_room * 4 + 64 * 16;
    Scratch memory{(char*)scratch(size_t(bytes))};
    Row* row = memory.take<Row>(rows);
    Query* query = memory.take<Query>(queries);
    const float** q_of = memory.take<const float*>(queries);
    float** scores_of = memory.take<float*>(queries);
    float* scores = memory.take<float>(queries * CHUNK);
    float* outputs = memory.take<float>(queries * width);
    float* node_scores = memory.take<float>(group * PAGE);
    float** node_scores_of = memory.take<float*>(group);
    const V** values = memory.take<const V*>(CHUNK);
    const V** tree_values = memory.take<const V*>(CHUNK);
    float* copied = memory.take<float>(value_room);  // values out of keys, if they lie there
    float* tree_copied = memory.take<float>(value_room);
    int32_t* paths = memory.take<int32_t>(rows * path_room);

    int64_t end = 0;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t index = first_row + r;
        Row& it = row[r];
        it.position = a.positions[index];
        it.base = a.base[index];
        it.window_from = a.window > 0 && it.position >= a.window ? it.position - a.window + 1 : 0;
        it.sinks = a.sinks;
        it.path = paths + r * path_room;
        it.path_size = 0;
        for (int64_t w = 0; w < a.words; w++)
            for (uint64_t bits = a.mask[index * a.words + w]; bits; bits &= bits - 1)
                it.path[it.path_size++] = int32_t(it.base + w * 64 + __builtin_ctzll(bits));
        it.path_from = it.position - it.path_size + 1;
        if (it.path_size == 0) it.path_from = 0;
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
    for (int64_t i = 0; i < group; i++) node_scores_of[i] = node_scores + i * PAGE;

    for (int64_t start = 0; start < end; start += CHUNK) {
        // who sees what
        uint64_t committed = 0, any = 0;
        int64_t active = 0;
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
        if (!any) continue;

        // committed keys: slot == position, so a page fills 16 lanes
        KeyPages<T> pages;
        int count = 0;
        for (int j = 0; j < CHUNK_PAGES; j++) {
            if (!(committed >> (j * PAGE) & 0xffff)) continue;
            const int64_t block = start / PAGE + j;
            const int64_t page = table[block];
            if (page < 0 || page >= g.pages) {
                __atomic_store_n(a.missing, 1 + first_row * g.blocks + block, __ATOMIC_RELAXED);
                return;
            }
            const T* k = k_head + page * g.heads * k_page;
            const T* v = v_head + page * g.heads * v_page;
            if constexpr (VALUES_IN_KEYS) {
                values_of_page(k, v_from, g.v_dim, width, copied + j * PAGE * width);
                for (int i = j * PAGE; i < (j + 1) * PAGE; i++) values[i] = copied + i * width;
                v = k;
            } else {
                for (int i = 0; i < PAGE; i++) values[j * PAGE + i] = v + i * g.padded;
            }
            const int64_t next = block + CHUNK_PAGES < g.blocks ? table[block + CHUNK_PAGES] : -1;
            pages.k[count] = k;
            pages.v[count] = v;
            pages.next_k[count] =
                k_head + (next >= 0 && next < g.pages ? next : page) * g.heads * k_page;
            pages.lane[count++] = j * PAGE;
        }
        dot_queries<T>(q_of, int(active), pages, count, g.dim, scores_of);

        for (int64_t r = 0; r < rows;) {
            Row& it = row[r];
            const uint64_t visible = it.committed | it.tree;
            if (!visible) {
                r++;
                continue;
            }
            const V* const* v = values;
            int64_t same = 1;  // rows that see the same keys and can share the loads of values
            if (it.tree) {
                // path nodes: score the pages they lie in, take the lane of each node
                for (int i = 0; i < CHUNK; i++) tree_values[i] = values[i];
                int64_t scored = -1;
                const T *node_k = nullptr, *node_v = nullptr;
                for (uint64_t bits = it.tree; bits; bits &= bits - 1) {
                    const int at = __builtin_ctzll(bits);
                    const int64_t slot = it.path[start + at - it.path_from];
                    if (slot / PAGE != scored) {
                        scored = slot / PAGE;
                        const int64_t page = table[scored];
                        if (page < 0 || page >= g.pages) {
                            __atomic_store_n(a.missing, 1 + (first_row + r) * g.blocks + scored,
                                             __ATOMIC_RELAXED);
                            return;
                        }
                        KeyPages<T> nodes;
                        nodes.k[0] = node_k = k_head + page * g.heads * k_page;
                        nodes.lane[0] = 0;
                        for (int64_t i = 0; i < group; i++) q_of[i] = query[r * group + i].q;
                        for (int64_t i = 0; i < group; i += QUERIES)
                            dot_some<T, false>(
                                q_of + i, group - i < QUERIES ? int(group - i) : QUERIES, nodes, 1,
                                g.dim, node_scores_of + i);
                        node_v = v_head + page * g.heads * v_page;
                    }
                    for (int64_t i = 0; i < group; i++)
                        query[r * group + i].scores[at] = node_scores_of[i][slot % PAGE];
                    if constexpr (VALUES_IN_KEYS) {
                        float* copy = tree_copied + at * width;
                        value_of_key(node_k + slot % PAGE, v_from, g.v_dim, width, copy);
                        tree_values[at] = copy;
                    } else {
                        tree_values[at] = node_v + slot % PAGE * g.padded;
                    }
                }
                v = tree_values;
            } else {
                while (r + same < rows && !row[r + same].tree &&
                       row[r + same].committed == visible)
                    same++;
            }
            const int64_t to = (r + same) * group;
            for (int64_t i = r * group; i < to; i += QUERIES) {
                const int n = to - i < QUERIES ? int(to - i) : QUERIES;
                Query* these[QUERIES];
                for (int j = 0; j < n; j++) {
                    these[j] = &query[i + j];
                    weigh(query[i + j], visible, a.scale, a.softcap);
                }
                add_values_queries<V>(these, n, v, visible, width);
            }
            r += same;
        }
    }

    for (int64_t i = 0; i < queries; i++) {
        const Query& it = query[i];
        const int64_t index = (first_row + i / group) * a.q_heads + first_head + i % group;
        float* out = a.out + index * g.v_dim;
        const bool empty = it.l == 0.0f;
        for (int64_t d = 0; d < g.v_dim; d += LANES) {
            const int n = g.v_dim - d < LANES ? int(g.v_dim - d) : LANES;
            store_first(out + d, empty ? zero() : load(it.o + d) / splat(it.l), n);
        }
        if (a.lse) a.lse[index] = empty ? -INFINITY : float(double(it.m) + std::log(double(it.l)));
    }
}

template <class T, bool VALUES_IN_KEYS>
void attention_of(const AttentionArgs& a) {
    const int64_t kv_heads = a.pages.groups * a.pages.heads, group = a.q_heads / kv_heads;
    // threads that would idle share the query heads of a KV head
    int64_t parts = 1;
    while (kv_heads * a.tiles * parts < num_threads() && group >= 2 * parts * QUERIES) parts *= 2;
    // all tiles of a head after each other: their keys stay in the second-level cache
    parallel(kv_heads * a.tiles * parts, 1, a.work, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; item++) {
            const int64_t head = item / (a.tiles * parts), part = item % parts;
            const int64_t* rows = a.tile_start + item / parts % a.tiles;
            const int64_t from = group * part / parts, to = group * (part + 1) / parts;
            attend_tile<T, VALUES_IN_KEYS>(
                a, {rows[0], rows[1] - rows[0], head, head * group + from, to - from});
        }
    });
}

template <class T>
void attention_in(const AttentionArgs& a) {
    if (a.pages.padded == 0)
        attention_of<T, true>(a);
    else
        attention_of<T, false>(a);
}

}  // namespace

void attention(const AttentionArgs& a) {
    if (a.pages.bf16)
        attention_in<bf16>(a);
    else
        attention_in<float>(a);
}

}  // namespace HASTEN_LEVEL
}  // namespace hasten
