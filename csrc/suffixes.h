// The places of a text of tokens, sorted by what is read from there on.
#pragma once

#include <cstdint>
#include <vector>

namespace hasten {

// Tokens by which places are sorted. What is searched and read on must not be longer together.
constexpr int64_t SUFFIX_DEPTH = 32;

// Sorts some places of a text (ids, or -1 at the end of a document) by their next SUFFIX_DEPTH
// tokens; equal ones by place.
void sort_suffixes(const int32_t* text, int64_t n, int32_t* places, int64_t count);

struct Continuations {
    int64_t matched = 0;  // tokens at the end of the context that were found
    // A tree in order of falling counts: parents come first, -1 is the end of the context.
    std::vector<int32_t> token, parent, count;
    int64_t looked_at = 0;  // occurrences that were counted
};

// What follows the longest end of a context (from `longest` tokens down to `shortest`) that occurs
// in the text: the `nodes` most frequent continuations of up to `length` tokens. Of more than
// `hits` occurrences that many are counted, evenly spaced in the order of `sorted`.
Continuations continuations(const int32_t* text, const int32_t* sorted, int64_t n,
                            const int32_t* context, int64_t size, int64_t shortest,
                            int64_t longest, int64_t length, int64_t nodes, int64_t hits);

}  // namespace hasten
