// Tables of tri-grams and the search over them.
#include "../trigrams.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <cmath>

#include "bindings.h"

namespace hasten {
namespace {

using Lists = std::pair<std::vector<int32_t>, std::vector<int32_t>>;

Lists lists_of(Draft draft) { return {std::move(draft.token), std::move(draft.parent)}; }

void make_corpus(TrigramCorpus* self, nb::handle pairs_, nb::handle offsets_, nb::handle tokens_,
                 nb::handle weights_) {
    Tensor pairs("pairs", pairs_), offsets("offsets", offsets_), tokens("tokens", tokens_);
    Tensor weights("weights", weights_);
    pairs.is(Type::i64).has_dims(1).contiguous();
    const int64_t rows = pairs.shape(0);
    offsets.is(Type::i64).has_shape({rows + 1}).contiguous();
    tokens.is(Type::i32).has_dims(1).contiguous();
    weights.is(Type::f32).has_shape({tokens.shape(0)}).contiguous();
    if (rows >= UINT32_MAX) pairs.fail("has more rows than a 32-bit number counts");
    const int64_t *p = pairs.as<int64_t>(), *at = offsets.as<int64_t>();
    const float* w = weights.floats();
    if (at[0] != 0 || at[rows] != tokens.shape(0)) offsets.fail("does not span the tokens");
    for (int64_t i = 0; i < rows; i++) {
        if (i && p[i] <= p[i - 1]) pairs.fail("is not in ascending order");
        if (at[i + 1] <= at[i] || at[i + 1] > tokens.shape(0))
            offsets.fail("is not in ascending order");
        for (int64_t j = at[i]; j < at[i + 1]; j++) {
            if (tokens.as<int32_t>()[j] < 0) tokens.fail("has negative ids");
            if (!(w[j] > 0) || !std::isfinite(w[j]) || (j > at[i] && w[j] > w[j - 1]))
                weights.fail("is not positive and in descending order within each pair");
        }
    }
    new (self) TrigramCorpus(p, at, tokens.as<int32_t>(), w, rows);
}

void make_table(Trigrams* self, const TrigramCorpus* corpus, int successors, double boost,
                double cap, double decay, double backoff, int64_t pairs, int iterations, int depth,
                int prefixes, double c1, double c2) {
    if (successors < 1 || successors >= Trigrams::ROW)
        fail("successors=" + text(successors) + ": between 1 and " + text(Trigrams::ROW - 1));
    new (self) Trigrams({successors, boost, cap, decay, backoff, pairs, iterations, depth, prefixes,
                         c1, c2},
                        corpus);
}

nb::list successors(const Trigrams& table, int32_t a, int32_t b) {
    const View view = table.find(a, b);
    nb::list found;
    for (int i = 0; i < view.row.count; i++)
        found.append(nb::make_tuple(view.row.token[i], view.scale * view.row.weight[i]));
    return found;
}

void absorb(Trigrams& table, const std::vector<int32_t>& tokens) {
    for (size_t i = 2; i < tokens.size(); i++)
        table.add(tokens[i - 2], tokens[i - 1], tokens[i], table.settings().boost);
}

// Row i: ids[i] may follow (before[i], last[i]), and gain these amounts.
void add_rows(Trigrams& table, const std::vector<int32_t>& before, const std::vector<int32_t>& last,
              nb::handle ids_, nb::handle amounts_) {
    Tensor ids("ids", ids_), amounts("amounts", amounts_);
    const int64_t rows = int64_t(before.size());
    if (last.size() != before.size()) fail("before and last differ in length");
    ids.is(Type::i64).has_shape({rows, -1}).contiguous();
    const int64_t k = ids.shape(1);
    amounts.is(Type::f32).has_shape({rows, k}).contiguous();
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < k; j++)
            table.add(before[i], last[i], int32_t(ids.as<int64_t>()[i * k + j]),
                      amounts.floats()[i * k + j]);
}

}  // namespace

void bind_trigrams(nb::module_& m) {
    using namespace nb::literals;
    nb::class_<TrigramCorpus>(m, "TrigramCorpus")
        .def("__init__", make_corpus, "pairs"_a, "offsets"_a, "tokens"_a, "weights"_a)
        .def("__len__", &TrigramCorpus::size);
    nb::class_<Trigrams>(m, "Trigrams")
        .def("__init__", make_table, nb::keep_alive<1, 2>(), "corpus"_a.none(), nb::kw_only(),
             "successors"_a, "boost"_a, "cap"_a, "decay"_a, "backoff"_a, "pairs"_a, "iterations"_a,
             "depth"_a, "prefixes"_a, "c1"_a, "c2"_a)
        .def("__len__", &Trigrams::size)
        .def_prop_ro("nbytes", &Trigrams::bytes)
        .def("absorb", absorb, "tokens"_a)
        .def("add_rows", add_rows, "before"_a, "last"_a, "ids"_a, "amounts"_a)
        .def("successors", successors, "a"_a, "b"_a)
        .def("search", [](const Trigrams& table, int32_t a, int32_t b, int budget, uint64_t key) {
            return lists_of(search_tree(table, a, b, budget, key));
        }, "a"_a, "b"_a, "budget"_a, "key"_a)
        .def("beam", [](const Trigrams& table, int32_t a, int32_t b, int budget) {
            return lists_of(search_beam(table, a, b, budget));
        }, "a"_a, "b"_a, "budget"_a);
}

}  // namespace hasten
