// Linear layers on the blocks of GGUF files.
#include <nanobind/stl/string.h>

#include "../blocks.h"
#include "bindings.h"

namespace hasten {
namespace {

Block block_of(const std::string& name) {
    if (name == "Q8_0") return Block::q8_0;
    if (name == "Q4_0") return Block::q4_0;
    if (name == "Q4_K") return Block::q4_k;
    if (name == "Q6_K") return Block::q6_k;
    fail("kind is " + name + ", not Q8_0, Q4_0, Q4_K or Q6_K");
}

// The stream of a weight [n, k], checked against its size.
const uint8_t* stream(nb::handle data_, Block kind, int64_t n, int64_t k) {
    if (n < 0 || k < 0 || k % block_values(kind))
        fail("k is " + text(k) + ", not a multiple of the block's " + text(block_values(kind)));
    Tensor data("data", data_);
    data.is(Type::u8).has_shape({strips_of(n) * STRIP_OUTPUTS * row_bytes(kind, k)}).contiguous();
    return data.as<uint8_t>();
}

void linear_blocks(nb::handle x_, nb::handle data_, const std::string& kind, int64_t n,
                   nb::handle bias_, nb::handle add_, nb::handle out_) {
    Tensor x("x", x_), out("out", out_);
    x.is(Type::f32).has_dims(2).contiguous(1);
    const int64_t rows = x.shape(0), k = x.shape(1);
    BlocksArgs a{block_of(kind), n, k};
    LinearPart part{x.floats(), rows, stream(data_, a.kind, n, k), nullptr, nullptr, out.floats()};
    out.is(Type::f32).has_shape({rows, n}).contiguous(1);
    a.x_stride = x.stride(0), a.out_stride = out.stride(0);
    if (!bias_.is_none())
        part.bias = Tensor("bias", bias_).is(Type::f32).has_shape({n}).contiguous().floats();
    if (!add_.is_none()) {
        Tensor add("add", add_);
        add.is(Type::f32).has_shape({rows, n}).contiguous(1);
        part.add = add.floats(), a.add_stride = add.stride(0);
    }
    if (rows == 0 || n == 0) return;
    launch("linear", n * row_bytes(a.kind, k), [a, part] { kernels().linear_blocks(a, &part, 1); });
}

void pack_blocks_(nb::handle rows_, const std::string& name, int64_t first, int64_t n, int64_t k,
                  nb::handle data_) {
    const Block kind = block_of(name);
    uint8_t* to = const_cast<uint8_t*>(stream(data_, kind, n, k));
    Tensor rows("rows", rows_);
    rows.is(Type::u8).has_shape({-1, row_bytes(kind, k)}).contiguous(1);
    const int64_t count = rows.shape(0);
    if (first < 0 || first + count > n)
        rows.fail("are " + text(first) + " to " + text(first + count) + " of " + text(n));
    nb::gil_scoped_release release;
    pack_blocks(kind, rows.as<uint8_t>(), rows.stride(0), first, count, k, to);
}

void unpack_blocks_(nb::handle data_, const std::string& name, int64_t n, nb::handle ids_,
                    nb::handle out_) {
    const Block kind = block_of(name);
    Tensor ids("ids", ids_), out("out", out_);
    ids.is(Type::i64).has_dims(1).contiguous();
    out.is(Type::f32).has_shape({ids.shape(0), -1}).contiguous();
    const uint8_t* data = stream(data_, kind, n, out.shape(1));
    for (int64_t i = 0; i < ids.shape(0); i++) {
        const int64_t id = ids.as<int64_t>()[i];
        if (id < 0 || id >= n)
            throw nb::index_error(("ids[" + text(i) + "] is " + text(id) + ", but the table has " +
                                   text(n) + " rows").c_str());
    }
    nb::gil_scoped_release release;
    unpack_blocks(kind, data, ids.as<int64_t>(), ids.shape(0), out.shape(1), out.floats());
}

}  // namespace

void bind_linear_blocks(nb::module_& m) {
    using namespace nanobind::literals;
    m.def("linear_blocks", &linear_blocks, "x"_a, "data"_a, "kind"_a, "n"_a, "bias"_a.none(),
          "add"_a.none(), "out"_a);
    m.def("pack_blocks", &pack_blocks_, "rows"_a, "kind"_a, "first"_a, "n"_a, "k"_a, "data"_a);
    m.def("unpack_blocks", &unpack_blocks_, "data"_a, "kind"_a, "n"_a, "ids"_a, "out"_a);
}

}  // namespace hasten
