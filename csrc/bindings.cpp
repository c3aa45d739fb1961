// hasten._native: checks every argument, then calls the kernels without the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "parallel.h"
#include "tensor.h"

namespace hasten {
namespace {

std::string text(int64_t x) { return std::to_string(x); }

[[noreturn]] void fail(const std::string& what) { throw nb::value_error(what.c_str()); }

// ---------------------------------------------------------------- weights

struct Packed {
    const void* data;
    bool bf16;
    int64_t n, k;
};

Packed packed(nb::handle object, int64_t n) {
    Tensor w("w", object);
    w.has_shape({(n + 15) / 16, -1, 16}).contiguous();
    if (w.type() != Type::f32 && w.type() != Type::bf16)
        w.fail_type(std::string("is ") + type_name(w.type()) + ", not float32 or bfloat16");
    return {w.as<void>(), w.type() == Type::bf16, n, w.shape(1)};
}

void linear(nb::handle x_, nb::handle w_, int64_t n, nb::handle bias_, nb::handle out_) {
    const Packed w = packed(w_, n);
    Tensor x("x", x_), out("out", out_);
    x.is(Type::f32).has_shape({-1, w.k}).contiguous(1);
    out.is(Type::f32).has_shape({x.shape(0), n}).contiguous(1);
    LinearArgs a{x.floats(), x.stride(0), x.shape(0), w.k, n, w.data, w.bf16, nullptr,
                 out.floats(), out.stride(0)};
    if (!bias_.is_none())
        a.bias = Tensor("bias", bias_).is(Type::f32).has_shape({n}).contiguous().floats();
    nb::gil_scoped_release release;
    kernels().linear(a);
}

void linear_grouped(nb::handle x_, nb::handle w_, int64_t n, nb::handle out_) {
    Tensor x("x", x_), w("w", w_), out("out", out_);
    w.has_shape({-1, (n + 15) / 16, -1, 16}).contiguous();
    if (w.type() != Type::f32 && w.type() != Type::bf16)
        w.fail_type(std::string("is ") + type_name(w.type()) + ", not float32 or bfloat16");
    const int64_t groups = w.shape(0), k = w.shape(2);
    x.is(Type::f32).has_shape({-1, groups, k}).contiguous(2);
    out.is(Type::f32).has_shape({x.shape(0), groups, n}).contiguous(2);
    LinearArgs a{x.floats(), x.stride(0), x.shape(0), k, n, w.as<void>(), w.type() == Type::bf16,
                 nullptr, out.floats(), out.stride(0)};
    a.parts = groups, a.x_part = x.stride(1), a.out_part = out.stride(1);
    nb::gil_scoped_release release;
    kernels().linear(a);
}

void pack_(nb::handle w_, nb::handle out_) {
    Tensor w("weight", w_), out("out", out_);
    w.has_dims(2).contiguous(1);
    Element element;
    switch (w.type()) {
        case Type::f32: element = Element::f32; break;
        case Type::bf16: element = Element::bf16; break;
        case Type::f16: element = Element::f16; break;
        default: w.fail_type(std::string("is ") + type_name(w.type()) + ", not a float type");
    }
    out.is(element == Element::bf16 ? Type::bf16 : Type::f32)
        .has_shape({(w.shape(0) + 15) / 16, w.shape(1), 16})
        .contiguous();
    nb::gil_scoped_release release;
    pack(w.as<void>(), element, w.stride(0), w.shape(0), w.shape(1), out.as<void>());
}

void unpack_(nb::handle w_, int64_t n, nb::handle out_) {
    const Packed w = packed(w_, n);
    Tensor out("out", out_);
    out.is(w.bf16 ? Type::bf16 : Type::f32).has_shape({n, w.k}).contiguous();
    nb::gil_scoped_release release;
    unpack(w.data, w.bf16, n, w.k, out.as<void>());
}

void embed_(nb::handle ids_, nb::handle w_, int64_t n, nb::handle out_) {
    const Packed w = packed(w_, n);
    Tensor ids("ids", ids_), out("out", out_);
    ids.is(Type::i64).has_dims(1).contiguous();
    out.is(Type::f32).has_shape({ids.shape(0), w.k}).contiguous();
    for (int64_t i = 0; i < ids.shape(0); i++) {
        const int64_t id = ids.as<int64_t>()[i];
        if (id < 0 || id >= n)
            throw nb::index_error(("ids[" + text(i) + "] is " + text(id) + ", but the table has " +
                                   text(n) + " rows").c_str());
    }
    nb::gil_scoped_release release;
    embed(ids.as<int64_t>(), ids.shape(0), w.data, w.bf16, w.k, out.floats());
}

// ---------------------------------------------------------------- rows

// [..., size] with up to three dimensions as [outer, inner, size]
struct Rows {
    int64_t outer, inner, size, outer_stride, inner_stride;
};

Rows rows_of(Tensor& x) {
    if (x.ndim() < 1 || x.ndim() > 3) x.fail("has shape " + x.shape_text() + ", not 1 to 3 dimensions");
    const int last = x.ndim() - 1;
    x.is(Type::f32).contiguous(last);
    Rows r{1, 1, x.shape(last), 0, 0};
    if (last >= 1) r.inner = x.shape(last - 1), r.inner_stride = x.stride(last - 1);
    if (last >= 2) r.outer = x.shape(0), r.outer_stride = x.stride(0);
    return r;
}

void same_shape(Tensor& a, const Tensor& b) {
    bool same = a.ndim() == b.ndim();
    for (int i = 0; same && i < a.ndim(); i++) same = a.shape(i) == b.shape(i);
    if (!same) a.fail("has shape " + a.shape_text() + ", not " + b.shape_text());
}

void rms_norm(nb::handle x_, nb::handle residual_, nb::handle weight_, float eps, nb::handle out_,
              nb::handle sum_) {
    Tensor x("x", x_), weight("weight", weight_), out("out", out_);
    const Rows r = rows_of(x);
    weight.is(Type::f32).has_shape({r.size}).contiguous();
    same_shape(out.is(Type::f32).contiguous(), x);
    NormArgs a{x.floats(), r.outer_stride, r.inner_stride, nullptr, 0, 0, weight.floats(), eps,
               r.outer, r.inner, r.size, out.floats(), nullptr};
    if (!residual_.is_none()) {
        Tensor residual("residual", residual_), sum("sum", sum_);
        const Rows s = rows_of(residual);
        same_shape(residual, x);
        same_shape(sum.is(Type::f32).contiguous(), x);
        a.residual = residual.floats();
        a.residual_outer = s.outer_stride;
        a.residual_inner = s.inner_stride;
        a.sum = sum.floats();
    }
    nb::gil_scoped_release release;
    kernels().rms_norm(a);
}

void gated(nb::handle x_, bool gelu, nb::handle out_) {
    Tensor x("x", x_), out("out", out_);
    x.is(Type::f32).has_dims(2).contiguous(1);
    if (x.shape(1) % 2) x.fail("has an odd number of columns, not a gate and an up half");
    out.is(Type::f32).has_shape({x.shape(0), x.shape(1) / 2}).contiguous();
    GatedArgs a{x.floats(), x.stride(0), x.shape(0), x.shape(1) / 2, gelu, out.floats()};
    nb::gil_scoped_release release;
    kernels().gated(a);
}

void softcap(nb::handle x_, float cap, nb::handle out_) {
    Tensor x("x", x_), out("out", out_);
    x.is(Type::f32).contiguous();
    same_shape(out.is(Type::f32).contiguous(), x);
    if (!(cap > 0.0f)) fail("the cap must be positive");
    nb::gil_scoped_release release;
    kernels().softcap({x.floats(), x.size(), cap, out.floats()});
}

void row_max_lse(nb::handle x_, nb::handle argmax_, nb::handle max_, nb::handle lse_) {
    Tensor x("logits", x_), argmax("argmax", argmax_), max("max", max_), lse("lse", lse_);
    x.is(Type::f32).has_dims(2).contiguous(1);
    if (x.shape(1) < 1) x.fail("has no columns");
    const int64_t rows = x.shape(0);
    argmax.is(Type::i64).has_shape({rows}).contiguous();
    max.is(Type::f32).has_shape({rows}).contiguous();
    lse.is(Type::f32).has_shape({rows}).contiguous();
    MaxLseArgs a{x.floats(), x.stride(0), rows, x.shape(1), argmax.as<int64_t>(), max.floats(),
                 lse.floats()};
    nb::gil_scoped_release release;
    kernels().row_max_lse(a);
}

void route(nb::handle x_, int64_t top, bool normalize, nb::handle ids_, nb::handle weights_,
           int64_t groups, int64_t top_groups) {
    Tensor x("router_logits", x_), ids("ids", ids_), weights("weights", weights_);
    x.is(Type::f32).has_dims(2).contiguous(1);
    const int64_t experts = x.shape(1);
    if (groups < 1 || experts % groups || top_groups < 1 || top_groups > groups)
        fail("cannot choose " + text(top_groups) + " of " + text(groups) + " equal groups of " +
             text(experts) + " experts");
    const int64_t most = experts / groups * top_groups;
    if (top < 1 || top > most)
        fail("k is " + text(top) + ", but there are " + text(most) + " experts" +
             (groups > 1 ? " in the chosen groups" : ""));
    ids.is(Type::i32).has_shape({x.shape(0), top}).contiguous();
    weights.is(Type::f32).has_shape({x.shape(0), top}).contiguous();
    RouteArgs a{x.floats(), x.stride(0), x.shape(0), experts, top, normalize,
                ids.as<int32_t>(), weights.floats(), groups, top_groups};
    nb::gil_scoped_release release;
    kernels().route(a);
}

// ---------------------------------------------------------------- pages

// Value pages without columns (padded 0) say that values lie in the keys.
Pages pages_of(nb::handle k_, nb::handle v_, nb::handle table_, int64_t v_dim) {
    Tensor k("k_pages", k_), v("v_pages", v_), table("table", table_);
    k.has_shape({-1, -1, -1, PAGE}).contiguous();
    const bool in_keys = v.has_dims(4).shape(3) == 0;
    const int64_t padded = in_keys ? 0 : (v_dim + 15) / 16 * 16;
    v.has_shape({k.shape(0), k.shape(1), PAGE, padded}).contiguous();
    if (in_keys && v_dim > k.shape(2))
        v.fail("are empty, but keys of " + text(k.shape(2)) + " dimensions cannot hold values of " +
               text(v_dim));
    if (k.type() != Type::f32 && k.type() != Type::bf16)
        k.fail_type(std::string("is ") + type_name(k.type()) + ", not float32 or bfloat16");
    v.is(k.type());
    table.is(Type::i32).has_dims(3).contiguous();
    return {k.as<void>(),   v.as<void>(),   k.type() == Type::bf16,
            k.shape(0),     k.shape(1),     k.shape(2),
            v_dim,          padded,         table.as<int32_t>(),
            table.shape(0), table.shape(1), table.shape(2)};
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

void append(nb::handle q_, nb::handle k_, nb::handle v_, nb::handle cos_, nb::handle sin_,
            nb::handle positions_, nb::handle slots_, nb::handle table_row_, nb::handle table_,
            nb::handle k_pages_, nb::handle v_pages_) {
    AppendArgs a{};
    Tensor q("q", q_), k("k", k_), v("v", v_), cos("cos", cos_), sin("sin", sin_);
    Pages& g = a.pages = pages_of(k_pages_, v_pages_, table_, v.has_dims(3).shape(2));
    const int64_t rows = q.has_dims(3).shape(0), kv_heads = g.groups * g.heads;
    q.is(Type::f32).has_shape({rows, -1, g.dim}).contiguous(1);
    k.is(Type::f32).has_shape({rows, kv_heads, g.dim}).contiguous(1);
    v.is(Type::f32).has_shape({rows, kv_heads, g.padded ? g.v_dim : 0}).contiguous(1);
    cos.is(Type::f32).has_dims(2).contiguous();
    sin.is(Type::f32).has_shape({cos.shape(0), cos.shape(1)}).contiguous();
    if (2 * cos.shape(1) > g.dim)
        cos.fail("rotates " + text(2 * cos.shape(1)) + " of " + text(g.dim) + " dimensions");
    a.q = q.floats(), a.q_stride = q.stride(0), a.q_heads = q.shape(1);
    a.k = k.floats(), a.k_stride = k.stride(0);
    a.v = v.floats(), a.v_stride = v.stride(0);
    a.cos = cos.floats(), a.sin = sin.floats(), a.half = cos.shape(1), a.rows = rows;
    a.positions = row_ints("positions", positions_, rows);
    a.slots = row_ints("slots", slots_, rows);
    a.table_row = row_ints("table_row", table_row_, rows);
    check_table_rows(a.table_row, rows, g.tables);
    for (int64_t i = 0; i < rows; i++) {
        if (a.positions[i] < 0 || a.positions[i] >= cos.shape(0))
            fail(where("positions", i, a.positions[i]) + ", but cos has " + text(cos.shape(0)) +
                 " rows");
        check_slot("slots", i, a.slots[i], a.table_row[i], g.table, g.groups, g.blocks, g.pages);
    }
    nb::gil_scoped_release release;
    kernels().append(a);
}

void attention(nb::handle q_, nb::handle k_pages_, nb::handle v_pages_, nb::handle table_,
               nb::handle table_row_, nb::handle positions_, nb::handle base_, nb::handle mask_,
               float scale, int64_t window, int64_t sinks, float cap, nb::handle out_,
               nb::handle lse_) {
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

    check_table_rows(a.table_row, rows, g.tables);
    const int64_t slots = g.blocks * PAGE, tile_queries = 16;
    const int64_t tile_rows = std::max<int64_t>(1, tile_queries * kv_heads / std::max<int64_t>(1, q_heads));
    std::vector<int64_t> starts;
    for (int64_t i = 0; i < rows; i++) {
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
        if (starts.empty() || a.table_row[i] != a.table_row[i - 1] ||
            i - starts.back() == tile_rows)
            starts.push_back(i);
        a.work += (a.base[i] + count) * q_heads * (g.dim + g.v_dim);
    }
    starts.push_back(rows);
    a.tile_start = starts.data();
    a.tiles = int64_t(starts.size()) - 1;
    int64_t missing = 0;
    a.missing = &missing;
    {
        nb::gil_scoped_release release;
        kernels().attention(a);
    }
    if (missing) {
        const int64_t row = (missing - 1) / g.blocks, block = (missing - 1) % g.blocks;
        fail("row " + text(row) + " (or one after it in its sequence) reads block " + text(block) +
             " of table " + text(a.table_row[row]) + ", which holds no valid page");
    }
}

void check_pages(const Tensor& ids, const char* name, int64_t pages) {
    for (int64_t i = 0; i < ids.shape(0); i++) {
        const int64_t page = ids.as<int64_t>()[i];
        if (page < 0 || page >= pages)
            fail(where(name, i, page) + ", but there are " + text(pages) + " pages");
    }
}

void check_storage(Tensor& k, Tensor& v) {
    k.has_shape({-1, -1, -1, -1, PAGE}).contiguous();
    v.has_shape({k.shape(0), k.shape(1), k.shape(2), PAGE, -1}).contiguous();
    if (k.type() != Type::f32 && k.type() != Type::bf16)
        k.fail_type(std::string("is ") + type_name(k.type()) + ", not float32 or bfloat16");
    v.is(k.type());
}

void copy_pages_(nb::handle k_, nb::handle v_, nb::handle src_, nb::handle dst_) {
    Tensor k("k", k_), v("v", v_), src("src", src_), dst("dst", dst_);
    check_storage(k, v);
    src.is(Type::i64).has_dims(1).contiguous();
    dst.is(Type::i64).has_shape({src.shape(0)}).contiguous();
    check_pages(src, "src", k.shape(1));
    check_pages(dst, "dst", k.shape(1));
    const int64_t item = k.type() == Type::bf16 ? 2 : 4, layers = k.shape(0), pages = k.shape(1);
    const int64_t *from = src.as<int64_t>(), *to = dst.as<int64_t>();
    nb::gil_scoped_release release;
    copy_pages(k.as<char>(), layers, pages, k.shape(2) * k.shape(3) * PAGE * item, from, to,
               src.shape(0));
    copy_pages(v.as<char>(), layers, pages, v.shape(2) * PAGE * v.shape(4) * item, from, to,
               src.shape(0));
}

void move_slots_(nb::handle k_, nb::handle v_, nb::handle table_, nb::handle table_row_,
                 nb::handle src_, nb::handle dst_) {
    Tensor k("k", k_), v("v", v_), table("table", table_), rows("table_row", table_row_);
    check_storage(k, v);
    table.is(Type::i32).has_dims(3).contiguous();
    rows.is(Type::i32).has_dims(1).contiguous();
    MoveArgs a{k.as<void>(), v.as<void>(), k.shape(0), k.shape(1), k.shape(2), k.shape(3),
               v.shape(4), k.type() == Type::bf16 ? 2 : 4, table.as<int32_t>(), table.shape(1),
               table.shape(2), rows.as<int32_t>(), nullptr, nullptr, rows.shape(0)};
    a.src = row_ints("src_slot", src_, a.count);
    a.dst = row_ints("dst_slot", dst_, a.count);
    check_table_rows(a.table_row, a.count, table.shape(0));
    for (int64_t i = 0; i < a.count; i++) {
        check_slot("src_slot", i, a.src[i], a.table_row[i], a.table, a.groups, a.blocks, a.pages);
        check_slot("dst_slot", i, a.dst[i], a.table_row[i], a.table, a.groups, a.blocks, a.pages);
    }
    nb::gil_scoped_release release;
    move_slots(a);
}

// ---------------------------------------------------------------- the machine

void set_isa_(const std::string& name) {
    if (const char* problem = set_isa(name.c_str())) fail("HASTEN_ISA=" + name + ": " + problem);
}

void vector_math(nb::handle x_, bool tanh, nb::handle out_) {
    Tensor x("x", x_), out("out", out_);
    x.is(Type::f32).has_dims(1).contiguous();
    out.is(Type::f32).has_shape({x.shape(0)}).contiguous();
    kernels().vector_math(x.floats(), x.shape(0), tanh, out.floats());
}

double bandwidth(int64_t bytes, int repeats) {
    if (bytes < 1 || repeats < 1) fail("bytes and repeats must be positive");
    nb::gil_scoped_release release;
    return read_bandwidth(bytes, repeats);
}

}  // namespace
}  // namespace hasten

NB_MODULE(_native, m) {
    using namespace nanobind::literals;
    namespace h = hasten;

    m.def("linear", &h::linear, "x"_a, "w"_a, "n"_a, "bias"_a.none(), "out"_a);
    m.def("linear_grouped", &h::linear_grouped, "x"_a, "w"_a, "n"_a, "out"_a);
    m.def("pack", &h::pack_, "weight"_a, "out"_a);
    m.def("unpack", &h::unpack_, "w"_a, "n"_a, "out"_a);
    m.def("embed", &h::embed_, "ids"_a, "w"_a, "n"_a, "out"_a);
    m.def("rms_norm", &h::rms_norm, "x"_a, "residual"_a.none(), "weight"_a, "eps"_a, "out"_a,
          "sum"_a.none());
    m.def("gated", &h::gated, "x"_a, "gelu"_a, "out"_a);
    m.def("softcap", &h::softcap, "x"_a, "cap"_a, "out"_a);
    m.def("row_max_lse", &h::row_max_lse, "logits"_a, "argmax"_a, "max"_a, "lse"_a);
    m.def("route", &h::route, "router_logits"_a, "k"_a, "normalize"_a, "ids"_a, "weights"_a,
          "groups"_a = 1, "top_groups"_a = 1);
    m.def("append", &h::append, "q"_a, "k"_a, "v"_a, "cos"_a, "sin"_a, "positions"_a, "slots"_a,
          "table_row"_a, "table"_a, "k_pages"_a, "v_pages"_a);
    m.def("paged_attention", &h::attention, "q"_a, "k_pages"_a, "v_pages"_a, "table"_a,
          "table_row"_a, "positions"_a, "base"_a, "mask"_a, "scale"_a, "window"_a, "sinks"_a,
          "softcap"_a, "out"_a, "lse"_a.none());
    m.def("copy_pages", &h::copy_pages_, "k"_a, "v"_a, "src"_a, "dst"_a);
    m.def("move_slots", &h::move_slots_, "k"_a, "v"_a, "table"_a, "table_row"_a, "src_slot"_a,
          "dst_slot"_a);
    m.def("vector_math", &h::vector_math, "x"_a, "tanh"_a, "out"_a);

    m.def("set_num_threads", [](int n) {
        if (n < 1) h::fail("the number of threads must be positive");
        h::set_num_threads(n);
    }, "threads"_a);
    m.def("get_num_threads", &h::num_threads);
    m.def("set_isa", &h::set_isa_, "name"_a);
    m.def("get_isa", [] { return std::string(h::isa()); });
    m.def("isa_supported", [](const std::string& name) { return h::isa_supported(name.c_str()); },
          "name"_a);
    m.def("read_bandwidth", &h::bandwidth, "bytes"_a = int64_t(256) << 20, "repeats"_a = 5);

    if (const char* wanted = std::getenv("HASTEN_ISA"))
        if (*wanted) h::set_isa_(wanted);
}
