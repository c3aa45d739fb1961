// Search in a text of tokens.
#include "../suffixes.h"

#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "bindings.h"

namespace hasten {
namespace {

using Found = std::tuple<int64_t, int64_t, std::vector<int32_t>, std::vector<int32_t>,
                         std::vector<int32_t>>;

void sort_places(nb::handle tokens_, nb::handle places_, int64_t first, int64_t last) {
    Tensor tokens("tokens", tokens_), places("places", places_);
    tokens.is(Type::i32).has_dims(1).contiguous();
    places.is(Type::i32).has_dims(1).contiguous();
    const int64_t n = tokens.shape(0);
    if (first < 0 || first > last || last > places.shape(0))
        fail("no places " + text(first) + " to " + text(last) + " of " + text(places.shape(0)));
    int32_t* some = places.as<int32_t>() + first;
    for (int64_t i = 0; i < last - first; i++)
        if (some[i] < 0 || some[i] >= n)
            fail("place " + text(some[i]) + " is outside of the " + text(n) + " tokens");
    nb::gil_scoped_release release;
    sort_suffixes(tokens.as<int32_t>(), n, some, last - first);
}

// The places are trusted to be inside of the tokens: whoever opens a file checks them once.
Found find_continuations(nb::handle tokens_, nb::handle sorted_, const std::vector<int32_t>& context,
                         int64_t shortest, int64_t longest, int64_t length, int64_t nodes,
                         int64_t hits) {
    Tensor tokens("tokens", tokens_), sorted("sorted", sorted_);
    tokens.is(Type::i32).has_dims(1).contiguous();
    const int64_t n = tokens.shape(0);
    sorted.is(Type::i32).has_shape({n}).contiguous();
    if (shortest < 1 || longest < shortest || length < 0 || longest + length > SUFFIX_DEPTH)
        fail("need 1 <= shortest <= longest and longest + length <= " + text(SUFFIX_DEPTH));
    if (nodes < 0 || hits < 1) fail("need nodes >= 0 and hits >= 1");
    Continuations found = continuations(tokens.as<int32_t>(), sorted.as<int32_t>(), n,
                                        context.data(), int64_t(context.size()), shortest, longest,
                                        length, nodes, hits);
    return {found.matched, found.looked_at, std::move(found.token), std::move(found.parent),
            std::move(found.count)};
}

}  // namespace

void bind_suffixes(nb::module_& m) {
    m.def("sort_suffixes", sort_places, nb::arg("tokens"), nb::arg("places"), nb::arg("first"),
          nb::arg("last"));
    m.def("continuations", find_continuations, nb::arg("tokens"), nb::arg("sorted"),
          nb::arg("context"), nb::arg("shortest"), nb::arg("longest"), nb::arg("length"),
          nb::arg("nodes"), nb::arg("hits"));
    m.attr("SUFFIX_DEPTH") = SUFFIX_DEPTH;
}

}  // namespace hasten
