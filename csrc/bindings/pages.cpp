// Operations on paged keys and values.
#include <algorithm>
#include <utility>
#include <vector>

#include "matrix.h"

namespace hasten {
namespace {

Stored stored_as(const Tensor& pages) {
    switch (pages.type()) {
        case Type::f32: return Stored::f32;
        case Type::bf16: return Stored::bf16;
        case Type::i8: return Stored::i8;
        default:
            pages.fail_type(std::string("is ") + type_name(pages.type()) +
                            ", not float32, bfloat16 or int8");
    }
}

// Value pages without columns (padded 0) say that values lie in the keys.
Pages pages_of(nb::handle k_, nb::handle v_, nb::handle table_, int64_t v_dim) {
    Tensor k("k_pages", k_), v("v_pages", v_), table("table", table_);
    k.has_shape({-1, -1, -1, PAGE}).contiguous();
    const bool in_keys = v.has_dims(4).shape(3) == 0;
    Pages g{};
    g.k = k.as<void>(), g.v = v.as<void>(), g.type = stored_as(k);
    g.pages = k.shape(0), g.heads = k.shape(1), g.v_dim = v_dim;
    g.padded = in_keys ? 0 : (v_dim + 15) / 16 * 16;
    g.dim = k.shape(2) - g.scale_rows();
    if (g.dim < 0) k.fail("has no room for " + text(g.scale_rows()) + " rows of scales");
    v.is(k.type()).has_shape({g.pages, g.heads, PAGE, g.padded}).contiguous();
    if (in_keys && v_dim > g.dim)
        v.fail("are empty, but keys of " + text(g.dim) + " dimensions cannot hold values of " +
               text(v_dim));
    table.is(Type::i32).has_dims(3).contiguous();
    g.table = table.as<int32_t>();
    g.tables = table.shape(0), g.groups = table.shape(1), g.blocks = table.shape(2);
    return g;
}

const int32_t* row_ints(const char* name, nb::handle object, int64_t rows) {
    return Tensor(name, object).is(Type::i32).has_shape({rows}).contiguous().as<int32_t>();
}

std::string where(const char* name, int64_t i, int64_t value) {
    return std::string(name) + "[" + text(i) + "] is " + text(value);
}

void check_table_rows(const int32_t* table_row, int64_t rows, int64_t tables) {
    for (int64_t i = 0; i < rows; i++)
        if (table_row[i] < 0 || table_row[i] >= tables)
            fail(where("table_row", i, table_row[i]) + ", but there are " + text(tables) +
                 " tables");
}

// every head group's page of the slot exists
void check_slot(const char* name, int64_t i, int64_t slot, int64_t table_row, const int32_t* table,
                int64_t groups, int64_t blocks, int64_t pages) {
    if (slot < 0 || slot >= blocks * PAGE)
        fail(where(name, i, slot) + ", but a table has " + text(blocks * PAGE) + " slots");
    for (int64_t g = 0; g < groups; g++) {
        const int64_t page = table[(table_row * groups + g) * blocks + slot / PAGE];
        if (page < 0 || page >= pages)
            fail(where(name, i, slot) + ", but block " + text(slot / PAGE) + " of table " +
                 text(table_row) + ", head group " + text(g) + ", holds page " + text(page) +
                 " of " + text(pages));
    }
}

void check_append(const AppendArgs& a) {
    const Pages& g = a.pages;
    check_table_rows(a.table_row, a.rows, g.tables);
    for (int64_t i = 0; i < a.rows; i++) {
        if (a.positions[i] < 0 || a.positions[i] >= a.angles)
            fail(where("positions", i, a.positions[i]) + ", but cos has " + text(a.angles) +
                 " rows");
        check_slot("slots", i, a.slots[i], a.table_row[i], g.table, g.groups, g.blocks, g.pages);
    }
}

// What an append needs beside queries, keys and values: `rows` and the rest of its arguments.
void take_places(AppendArgs& a, int64_t rows, nb::handle cos_, nb::handle sin_,
                 nb::handle positions_, nb::handle slots_, nb::handle table_row_) {
    Tensor cos("cos", cos_), sin("sin", sin_);
    cos.is(Type::f32).has_dims(2).contiguous();
    sin.is(Type::f32).has_shape({cos.shape(0), cos.shape(1)}).contiguous();
    if (2 * cos.shape(1) > a.pages.dim)
        cos.fail("rotates " + text(2 * cos.shape(1)) + " of " + text(a.pages.dim) + " dimensions");
    a.cos = cos.floats(), a.sin = sin.floats(), a.angles = cos.shape(0), a.half = cos.shape(1);
    a.rows = rows;
    a.positions = row_ints("positions", positions_, rows);
    a.slots = row_ints("slots", slots_, rows);
    a.table_row = row_ints("table_row", table_row_, rows);
}

void append(nb::handle q_, nb::handle k_, nb::handle v_, nb::handle cos, nb::handle sin,
            nb::handle positions, nb::handle slots, nb::handle table_row, nb::handle table,
            nb::handle k_pages, nb::handle v_pages, bool rotate_keys) {
    AppendArgs a{};
    Tensor q("q", q_), k("k", k_), v("v", v_);
    const Pages& g = a.pages = pages_of(k_pages, v_pages, table, v.has_dims(3).shape(2));
    const int64_t rows = q.has_dims(3).shape(0), kv_heads = g.groups * g.heads;
    q.is(Type::f32).has_shape({rows, -1, g.dim}).contiguous(1);
    k.is(Type::f32).has_shape({rows, kv_heads, g.dim}).contiguous(1);
    v.is(Type::f32).has_shape({rows, kv_heads, g.padded ? g.v_dim : 0}).contiguous(1);
    a.q = q.floats(), a.q_stride = q.stride(0), a.q_heads = q.shape(1);
    a.k = k.floats(), a.k_stride = k.stride(0);
    a.v = v.floats(), a.v_stride = v.stride(0);
    a.rotate_keys = rotate_keys;
    take_places(a, rows, cos, sin, positions, slots, table_row);
    launch("append", 0, [a] {
        check_append(a);
        kernels().append(a);
    });
}

// The weight of a norm over spans of `size` numbers, each as long as the weight.
Norm norm_of(const char* name, nb::handle weight_, int64_t size) {
    if (weight_.is_none()) return {nullptr, 0};
    Tensor weight(name, weight_);
    weight.is(Type::f32).has_dims(1).contiguous();
    if (weight.shape(0) < 1 || size % weight.shape(0))
        weight.fail("has " + text(weight.shape(0)) + " numbers, which do not divide the " +
                    text(size) + " of a row");
    return {weight.floats(), weight.shape(0)};
}

// Queries, keys and values of the rows of x side by side in `heads`, then an append of them.
void qkv(nb::handle x_, nb::list matrices, nb::handle bias_, nb::handle q_norm, nb::handle k_norm,
         float eps, nb::handle cos, nb::handle sin, nb::handle positions, nb::handle slots,
         nb::handle table_row, nb::handle table, nb::handle k_pages, nb::handle v_pages,
         bool rotate_keys, nb::handle heads_) {
    AppendArgs a{};
    Tensor x("x", x_), heads("heads", heads_);
    const int64_t dim = heads.has_dims(3).shape(2);
    const Pages& g = a.pages = pages_of(k_pages, v_pages, table, dim);
    const int64_t rows = x.has_dims(2).shape(0), kv_heads = g.groups * g.heads;
    if (g.padded == 0) fail("v_pages have no room for values");
    heads.is(Type::f32).has_shape({rows, -1, g.dim}).contiguous();
    a.q_heads = heads.shape(1) - 2 * kv_heads;
    if (a.q_heads < 0) heads.fail("has no room for " + text(kv_heads) + " keys and values");
    const int64_t size = heads.shape(1) * dim;
    a.q = heads.floats(), a.k = a.q + a.q_heads * dim, a.v = a.k + kv_heads * dim;
    a.q_stride = a.k_stride = a.v_stride = size;
    a.q_norm = norm_of("q_norm", q_norm, a.q_heads * dim);
    a.k_norm = norm_of("k_norm", k_norm, kv_heads * dim);
    a.eps = eps;
    a.rotate_keys = rotate_keys;
    take_places(a, rows, cos, sin, positions, slots, table_row);

    const float* bias = optional_bias(bias_, size);
    std::vector<std::function<void()>> projections;
    int64_t column = 0, bytes = 0;
    for (nb::handle object : matrices) {
        std::visit(
            [&](auto w) {
                x.is(Type::f32).has_shape({rows, w.args.k}).contiguous(1);
                w.args.x_stride = x.stride(0), w.args.out_stride = size;
                const LinearPart part{x.floats(), rows, w.data, bias ? bias + column : nullptr,
                                      nullptr, a.q + column};
                column += w.args.n, bytes += w.bytes;
                projections.push_back([args = w.args, part] { run(args, &part, 1); });
            },
            nb::cast<Matrix&>(object).weights);
    }
    if (column != size)
        fail("the weight has " + text(column) + " outputs, not " + text(size) + " for " +
             text(a.q_heads) + " queries and " + text(kv_heads) + " keys and values of " +
             text(dim) + " dimensions");
    launch("qkv", bytes, [a, projections] {
        check_append(a);
        for (const auto& project : projections) project();
        kernels().append(a);
    });
}

// Checks what the rows say and attends. Gives the bytes of keys and values that it read: rows of one
// sequence share theirs.
int64_t attend(AttentionArgs a, int64_t angles) {
    const Pages& g = a.pages;
    check_table_rows(a.table_row, a.rows, g.tables);
    const int64_t slots = g.blocks * PAGE;
    int64_t read = 0, longest = 0;  // positions: of the sequences so far, of the present one
    for (int64_t i = 0; i < a.rows; i++) {
        if (a.base[i] < 0 || a.base[i] > slots)
            fail(where("base", i, a.base[i]) + ", but a table has " + text(slots) + " slots");
        int64_t count = 0, last = -1;
        for (int64_t w = 0; w < a.words; w++)
            if (const uint64_t bits = a.mask[i * a.words + w]) {
                count += __builtin_popcountll(bits);
                last = w * 64 + 63 - __builtin_clzll(bits);
            }
        if (a.base[i] + last >= slots)
            fail("mask of row " + text(i) + " reaches slot " + text(a.base[i] + last) +
                 ", but a table has " + text(slots) + " slots");
        if (count && a.positions[i] - count + 1 < a.base[i])
            fail("row " + text(i) + " at position " + text(a.positions[i]) + " has a path of " +
                 text(count) + " nodes, which would begin before its base " + text(a.base[i]));
        const int64_t end = count ? a.positions[i] + 1 : int64_t(a.base[i]);
        if (a.cos && end > angles)
            fail("row " + text(i) + " sees position " + text(end - 1) + ", but cos has angles of " +
                 text(angles) + " positions");
        a.end = std::max(a.end, end);
        if (i && a.table_row[i] != a.table_row[i - 1]) read += std::exchange(longest, 0);
        longest = std::max(longest, a.window ? std::min(end, a.window + a.sinks) : end);
        a.work += (a.base[i] + count) * a.q_heads * (g.dim + g.v_dim);
    }
    int64_t missing = 0;
    a.missing = &missing;
    kernels().attention(a);
    if (missing) {
        const int64_t row = (missing - 1) / g.blocks, block = (missing - 1) % g.blocks;
        fail("row " + text(row) + " (or one after it in its sequence) reads block " + text(block) +
             " of table " + text(a.table_row[row]) + ", which holds no valid page");
    }
    return (read + longest) * g.groups * g.heads * (g.k_page() + g.v_page()) / PAGE;
}

void attention(nb::handle q_, nb::handle k_pages_, nb::handle v_pages_, nb::handle table_,
               nb::handle table_row_, nb::handle positions_, nb::handle base_, nb::handle mask_,
               float scale, int64_t window, int64_t sinks, float cap, nb::handle cos_,
               nb::handle sin_, nb::handle out_, nb::handle lse_) {
    AttentionArgs a{};
    Tensor q("q", q_), mask("mask", mask_), out("out", out_);
    const Pages& g = a.pages = pages_of(k_pages_, v_pages_, table_, out.has_dims(3).shape(2));
    const int64_t rows = q.has_dims(3).shape(0), kv_heads = g.groups * g.heads;
    q.is(Type::f32).has_shape({rows, -1, g.dim}).contiguous(1);
    const int64_t q_heads = q.shape(1);
    if (kv_heads == 0 || q_heads % kv_heads)
        q.fail("has " + text(q_heads) + " heads, no multiple of the " + text(kv_heads) +
               " KV heads");
    mask.is(Type::u64).has_shape({rows, -1}).contiguous();
    out.is(Type::f32).has_shape({rows, q_heads, g.v_dim}).contiguous();
    a.q = q.floats(), a.q_stride = q.stride(0), a.q_heads = q_heads, a.rows = rows;
    a.table_row = row_ints("table_row", table_row_, rows);
    a.positions = row_ints("positions", positions_, rows);
    a.base = row_ints("base", base_, rows);
    a.mask = mask.as<uint64_t>(), a.words = mask.shape(1);
    a.scale = scale, a.softcap = cap, a.window = window, a.sinks = sinks;
    if (window < 0 || sinks < 0) fail("window and sinks cannot be negative");
    if (!(cap >= 0.0f)) fail("the soft cap must be positive");
    a.out = out.floats();
    if (!lse_.is_none())
        a.lse = Tensor("lse", lse_).is(Type::f32).has_shape({rows, q_heads}).contiguous().floats();

    int64_t angles = 0;
    if (!cos_.is_none()) {
        Tensor cos("cos", cos_), sin("sin", sin_);
        cos.is(Type::f32).has_shape({-1, -1, PAGE}).contiguous();
        sin.is(Type::f32).has_shape({cos.shape(0), cos.shape(1), PAGE}).contiguous();
        if (2 * cos.shape(1) > g.dim)
            cos.fail("rotates " + text(2 * cos.shape(1)) + " of " + text(g.dim) + " dimensions");
        a.cos = cos.floats(), a.sin = sin.floats(), a.half = cos.shape(1);
        angles = cos.shape(0) * PAGE;
    }
    launch("attention", 0, [a, angles] { return attend(a, angles); });
}

void check_pages(const char* name, const int64_t* ids, int64_t count, int64_t pages) {
    for (int64_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= pages)
            fail(where(name, i, ids[i]) + ", but there are " + text(pages) + " pages");
}

// Pages over layers; of int8 keys the last rows are scales.
Pages storage_of(Tensor& k, Tensor& v) {
    k.has_shape({-1, -1, -1, -1, PAGE}).contiguous();
    v.is(k.type()).has_shape({k.shape(0), k.shape(1), k.shape(2), PAGE, -1}).contiguous();
    Pages g{};
    g.k = k.as<void>(), g.v = v.as<void>(), g.type = stored_as(k);
    g.pages = k.shape(1), g.heads = k.shape(2), g.padded = v.shape(4);
    g.dim = k.shape(3) - g.scale_rows();
    if (g.dim < 0) k.fail("has no room for " + text(g.scale_rows()) + " rows of scales");
    return g;
}

void copy_pages_(nb::handle k_, nb::handle v_, nb::handle src_, nb::handle dst_) {
    Tensor k("k", k_), v("v", v_), src("src", src_), dst("dst", dst_);
    const Pages g = storage_of(k, v);
    src.is(Type::i64).has_dims(1).contiguous();
    dst.is(Type::i64).has_shape({src.shape(0)}).contiguous();
    const int64_t layers = k.shape(0), pages = g.pages, count = src.shape(0);
    const int64_t k_page = g.heads * g.k_page(), v_page = g.heads * g.v_page();
    const int64_t *from = src.as<int64_t>(), *to = dst.as<int64_t>();
    char *keys = k.as<char>(), *values = v.as<char>();
    launch("copy_pages", layers * count * (k_page + v_page), [=] {
        check_pages("src", from, count, pages);
        check_pages("dst", to, count, pages);
        copy_pages(keys, layers, pages, k_page, from, to, count);
        copy_pages(values, layers, pages, v_page, from, to, count);
    });
}

void move_slots_(nb::handle k_, nb::handle v_, nb::handle table_, nb::handle table_row_,
                 nb::handle src_, nb::handle dst_) {
    Tensor k("k", k_), v("v", v_), table("table", table_), rows("table_row", table_row_);
    const Pages g = storage_of(k, v);
    table.is(Type::i32).has_dims(3).contiguous();
    rows.is(Type::i32).has_dims(1).contiguous();
    MoveArgs a{g.k,      g.v,      k.shape(0), g.pages, g.heads, g.dim, g.padded,
               g.item(), g.scale_rows() / SCALE_ROWS, table.as<int32_t>(), table.shape(1),
               table.shape(2), rows.as<int32_t>(), nullptr, nullptr, rows.shape(0)};
    a.src = row_ints("src_slot", src_, a.count);
    a.dst = row_ints("dst_slot", dst_, a.count);
    launch("move_slots", 0, [a, tables = table.shape(0)] {
        check_table_rows(a.table_row, a.count, tables);
        for (int64_t i = 0; i < a.count; i++) {
            for (const auto& [name, slots] : {std::pair{"src_slot", a.src}, {"dst_slot", a.dst}})
                check_slot(name, i, slots[i], a.table_row[i], a.table, a.groups, a.blocks, a.pages);
        }
        move_slots(a);
    });
}

}  // namespace

void bind_pages(nb::module_& m) {
    using namespace nanobind::literals;
    m.def("append", &append, "q"_a, "k"_a, "v"_a, "cos"_a, "sin"_a, "positions"_a, "slots"_a,
          "table_row"_a, "table"_a, "k_pages"_a, "v_pages"_a,
          "rotate_keys"_a = true);
    m.def("qkv", &qkv, "x"_a, "matrices"_a, "bias"_a.none(), "q_norm"_a.none(), "k_norm"_a.none(),
          "eps"_a, "cos"_a, "sin"_a, "positions"_a, "slots"_a, "table_row"_a, "table"_a,
          "k_pages"_a, "v_pages"_a, "rotate_keys"_a, "heads"_a);
    m.def("paged_attention", &attention, "q"_a, "k_pages"_a, "v_pages"_a, "table"_a,
          "table_row"_a, "positions"_a, "base"_a, "mask"_a, "scale"_a, "window"_a, "sinks"_a,
          "softcap"_a, "cos"_a.none(), "sin"_a.none(), "out"_a, "lse"_a.none());
    m.def("copy_pages", &copy_pages_, "k"_a, "v"_a, "src"_a, "dst"_a);
    m.def("move_slots", &move_slots_, "k"_a, "v"_a, "table"_a, "table_row"_a, "src_slot"_a,
          "dst_slot"_a);
}

}  // namespace hasten
