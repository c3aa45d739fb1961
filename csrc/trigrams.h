// Tables of tri-grams, and the search that turns one into a draft tree (ADED).
//
// A table maps a pair of tokens (a, b) to the tokens that followed it and their weights. There is
// one immutable `TrigramCorpus` (counts of a text) for any number of `Trigrams`, each of which
// learns from the texts of one tenant: a pair that it has changed hides the corpus' entry.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace hasten {

// Pairs to row numbers: open addressing with linear probing, at most half full.
class PairIndex {
  public:
    static constexpr uint32_t NONE = UINT32_MAX;
    PairIndex() { clear(0); }
    uint32_t find(uint64_t pair) const;
    void insert(uint64_t pair, uint32_t row);  // `pair` must be new
    void clear(size_t expected);
    size_t bytes() const { return slots_.size() * sizeof(Slot); }

  private:
    struct Slot {
        uint64_t pair;
        uint32_t row;
    };
    size_t place(uint64_t pair) const;
    std::vector<Slot> slots_;
    size_t mask_, used_;
};

// (a, b) as one number. Rows of b alone, for pairs that are unknown, have the context ANY.
constexpr int32_t ANY = -1;
inline uint64_t pair_of(int32_t a, int32_t b) { return uint64_t(uint32_t(a)) << 32 | uint32_t(b); }

// What may follow: the first `count` of its row, heaviest first, then lowest id.
struct Successors {
    const int32_t* token;
    const float* weight;
    int count;
};

class TrigramCorpus {
  public:
    // Row i holds the successors offsets[i] .. offsets[i + 1] of pair i.
    TrigramCorpus(const int64_t* pairs, const int64_t* offsets, const int32_t* tokens,
                  const float* weights, int64_t rows);
    Successors find(uint64_t pair) const;
    int64_t size() const { return int64_t(offsets_.size()) - 1; }

  private:
    std::vector<int64_t> offsets_;
    std::vector<int32_t> tokens_;
    std::vector<float> weights_;
    PairIndex index_;
};

struct TrigramSettings {
    int successors = 12;   // of a pair that the search looks at
    double boost = 0.04;   // what an occurrence adds
    double cap = 3.0;      // of a weight
    double decay = 1.0;    // of the other successors' weights at each occurrence
    double backoff = 0.0;  // weight of a token's own successors where its pair is unknown
    int64_t pairs = 32768;  // that a table holds
    int iterations = 150;
    int depth = 3;      // of the search; the last token of a draft lies one deeper
    int prefixes = 24;  // most visited ones that are drafted, the empty one among them
    double c1 = 32, c2 = 8;
};

// What the search looks at of a pair: weights are multiplied by `scale`.
struct View {
    Successors row;
    double scale;
};

class Trigrams {
  public:
    // At least one more than any `successors`, so that new ones have a place to grow.
    static constexpr int ROW = 16;

    Trigrams(const TrigramSettings& settings, const TrigramCorpus* corpus);
    const TrigramSettings& settings() const { return settings_; }
    // `exploration` by the visits of a parent, up to `iterations`.
    const std::vector<double>& exploration() const { return exploration_; }

    // Adds `amount` to the weight of c after (a, b), and after b if there is back-off.
    void add(int32_t a, int32_t b, int32_t c, double amount);
    View find(int32_t a, int32_t b) const;
    int64_t size() const { return int64_t(rows_.size()); }
    int64_t bytes() const;

  private:
    struct Row {
        uint64_t pair, touched;
        int32_t count;
        int32_t token[ROW];
        float weight[ROW];
    };
    Successors find(uint64_t pair) const;
    Row& row_for(uint64_t pair);
    void raise(uint64_t pair, int32_t token, double amount);
    void evict();

    TrigramSettings settings_;
    const TrigramCorpus* corpus_;
    std::vector<double> exploration_;
    std::vector<Row> rows_;
    PairIndex index_;
    uint64_t clock_ = 0;
};

// A tree of tokens below the pending one, b: node 0, with the parent -1. Sorted by depth.
struct Draft {
    std::vector<int32_t> token, parent;
};

// Monte-Carlo tree search from (a, b). `key` chooses the roll-outs: the same key, table and budget
// give the same draft. It does not change the table.
Draft search_tree(const Trigrams& table, int32_t a, int32_t b, int budget, uint64_t key);

// Of all paths of up to depth + 1 tokens the `budget` nodes that are likeliest by the shares of
// their weights.
Draft search_beam(const Trigrams& table, int32_t a, int32_t b, int budget);

// How much a child of weight w draws the search beside its mean value: (c1 + ln((N + c2 + 1) / c2))
// * w * sqrt(N) / (1 + n), with the visits N of its parent and n of its own. What depends on N:
double exploration(const TrigramSettings& settings, int visits);

}  // namespace hasten
