// Linear layers on the blocks of GGUF files.
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <vector>

#include "experts.h"
#include "matrix.h"

namespace hasten {
namespace {

Block block_of(const std::string& name) {
    if (name == "Q8_0") return Block::q8_0;
    if (name == "Q4_0") return Block::q4_0;
    if (name == "Q4_K") return Block::q4_k;
    if (name == "Q6_K") return Block::q6_k;
    fail("kind is " + name + ", not Q8_0, Q4_0, Q4_K or Q6_K");
}

void check_shape(const BlockStream& s) {
    if (s.n < 0 || s.k < 1 || s.k % block_values(s.kind) || (s.gated && s.n % 2))
        fail("w cannot have " + text(s.n) + " outputs of " + text(s.k) + " inputs in blocks of " +
             text(block_values(s.kind)));
}

BlockStream stream(nb::handle data_, const std::string& kind, int64_t n, int64_t k, bool gated) {
    Tensor data("w", data_);
    data.is(Type::u8).has_dims(1).contiguous();
    const BlockStream s{data.as<uint8_t>(), block_of(kind), n, k, gated};
    check_shape(s);
    if (s.bytes() != data.size())
        data.fail("has " + text(data.size()) + " bytes, not " + text(s.bytes()));
    return s;
}

Weights<BlocksArgs> weights(const BlockStream& w) {
    return {{w.kind, w.n, w.k}, w.data, w.bytes()};
}

Matrix matrix(nb::object w, const std::string& kind, int64_t n, int64_t k) {
    return {weights(stream(w, kind, n, k, false)), w};
}

void linear_blocks(nb::handle x, nb::handle w, const std::string& kind, int64_t n, int64_t k,
                   nb::handle bias, nb::handle add, nb::handle out) {
    launch_linear(weights(stream(w, kind, n, k, false)), x, bias, add, out);
}

void linear_blocks_gated(nb::handle x, nb::handle w, const std::string& kind, int64_t n, int64_t k,
                         nb::handle bias, const std::string& gate, nb::handle out) {
    launch_gated(weights(stream(w, kind, n, k, true)), gate, x, bias, out);
}

void linear_blocks_experts(nb::handle x_, const TensorList& weights, const std::string& kind,
                           int64_t n, int64_t k, nb::handle gate_, nb::handle offsets_,
                           nb::handle out_) {
    const bool gated = !gate_.is_none();
    const BlockStream w{nullptr, block_of(kind), n, k, gated};
    check_shape(w);
    if (weights.type() != Type::u8 || weights.shape() != std::vector{w.bytes()})
        fail("the experts' weights are not [" + text(n) + ", " + text(k) + "] in " +
             text(w.bytes()) + " bytes");
    const ExpertRows rows(x_, weights, k, offsets_, gated ? n / 2 : n, out_);
    BlocksArgs a{w.kind, n, k};
    if (gated) a.gate = gate_of(nb::cast<std::string>(gate_));
    a.x_stride = rows.x_stride, a.out_stride = rows.out_stride;
    launch("linear_experts", rows.most_weights() * w.bytes(), [a, rows] {
        const std::vector<LinearPart> parts = rows.parts();
        run(a, parts.data(), int64_t(parts.size()));
    });
}

void put_blocks(nb::handle rows_, const std::string& kind, int64_t n, int64_t k, bool gated,
                int64_t first, nb::handle w_) {
    const BlockStream w = stream(w_, kind, n, k, gated);
    Tensor rows("rows", rows_);
    rows.is(Type::u8).has_shape({-1, row_bytes(w.kind, k)}).contiguous(1);
    const int64_t count = rows.shape(0);
    if (first < 0 || first + count > n) fail("rows from " + text(first) + " on are not in w");
    nb::gil_scoped_release release;
    pack_blocks(w, rows.as<uint8_t>(), rows.stride(0), first, count);
}

void embed_blocks(nb::handle ids_, nb::handle w_, const std::string& kind, int64_t n, int64_t k,
                  bool gated, nb::handle out_) {
    const BlockStream w = stream(w_, kind, n, k, gated);
    Tensor ids("ids", ids_), out("out", out_);
    ids.is(Type::i64).has_dims(1).contiguous();
    out.is(Type::f32).has_shape({ids.shape(0), k}).contiguous();
    const int64_t rows = ids.shape(0), *id = ids.as<int64_t>();
    float* to = out.floats();
    launch("embed", rows * row_bytes(w.kind, k), [w, rows, id, to] {
        for (int64_t i = 0; i < rows; i++)
            if (id[i] < 0 || id[i] >= w.n)
                throw std::out_of_range("ids[" + text(i) + "] is " + text(id[i]) +
                                        ", but the table has " + text(w.n) + " rows");
        unpack_blocks(w, id, rows, to);
    });
}

}  // namespace

void bind_linear_blocks(nb::module_& m) {
    using namespace nanobind::literals;
    m.def("matrix_blocks", &matrix, "w"_a, "kind"_a, "n"_a, "k"_a);
    m.def("linear_blocks", &linear_blocks, "x"_a, "w"_a, "kind"_a, "n"_a, "k"_a, "bias"_a.none(),
          "add"_a.none(), "out"_a);
    m.def("linear_blocks_gated", &linear_blocks_gated, "x"_a, "w"_a, "kind"_a, "n"_a, "k"_a,
          "bias"_a.none(), "gate"_a, "out"_a);
    m.def("linear_blocks_experts", &linear_blocks_experts, "x"_a, "weights"_a, "kind"_a, "n"_a,
          "k"_a, "gate"_a.none(), "offsets"_a, "out"_a);
    m.def("put_blocks", &put_blocks, "rows"_a, "kind"_a, "n"_a, "k"_a, "gated"_a, "first"_a, "w"_a);
    m.def("embed_blocks", &embed_blocks, "ids"_a, "w"_a, "kind"_a, "n"_a, "k"_a, "gated"_a,
          "out"_a);
}

}  // namespace hasten
