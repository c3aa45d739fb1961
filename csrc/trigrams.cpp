#include "trigrams.h"

#include <algorithm>

namespace hasten {

size_t PairIndex::place(uint64_t pair) const {
    uint64_t h = pair * 0x9E3779B97F4A7C15u;
    size_t at = (h ^ h >> 32) & mask_;
    while (slots_[at].row != NONE && slots_[at].pair != pair) at = (at + 1) & mask_;
    return at;
}

uint32_t PairIndex::find(uint64_t pair) const { return slots_[place(pair)].row; }

void PairIndex::insert(uint64_t pair, uint32_t row) {
    if (2 * (used_ + 1) > slots_.size()) {
        const std::vector<Slot> old = std::move(slots_);
        clear(old.size());
        for (const Slot& s : old)
            if (s.row != NONE) slots_[place(s.pair)] = s, used_++;
    }
    slots_[place(pair)] = {pair, row};
    used_++;
}

void PairIndex::clear(size_t expected) {
    size_t size = 64;
    while (size < 2 * expected) size *= 2;
    slots_.assign(size, {0, NONE});
    mask_ = size - 1, used_ = 0;
}

TrigramCorpus::TrigramCorpus(const int64_t* pairs, const int64_t* offsets, const int32_t* tokens,
                             const float* weights, int64_t rows)
    : offsets_(offsets, offsets + rows + 1),
      tokens_(tokens, tokens + offsets[rows]),
      weights_(weights, weights + offsets[rows]) {
    index_.clear(size_t(rows));
    for (int64_t i = 0; i < rows; i++) index_.insert(uint64_t(pairs[i]), uint32_t(i));
}

Successors TrigramCorpus::find(uint64_t pair) const {
    const uint32_t row = index_.find(pair);
    if (row == PairIndex::NONE) return {nullptr, nullptr, 0};
    const int64_t at = offsets_[row];
    return {tokens_.data() + at, weights_.data() + at, int(offsets_[row + 1] - at)};
}

Trigrams::Trigrams(const TrigramSettings& settings, const TrigramCorpus* corpus)
    : settings_(settings), corpus_(corpus) {
    for (int n = 0; n <= settings.iterations; n++)
        exploration_.push_back(hasten::exploration(settings, n));
}

int64_t Trigrams::bytes() const {
    return int64_t(rows_.capacity() * sizeof(Row) + index_.bytes());
}

Successors Trigrams::find(uint64_t pair) const {
    const uint32_t row = index_.find(pair);
    if (row != PairIndex::NONE) return {rows_[row].token, rows_[row].weight, rows_[row].count};
    return corpus_ ? corpus_->find(pair) : Successors{nullptr, nullptr, 0};
}

View Trigrams::find(int32_t a, int32_t b) const {
    View view{find(pair_of(a, b)), 1.0};
    if (!view.row.count && settings_.backoff > 0)
        view = {find(pair_of(ANY, b)), settings_.backoff};
    view.row.count = std::min(view.row.count, settings_.successors);
    return view;
}

void Trigrams::add(int32_t a, int32_t b, int32_t c, double amount) {
    raise(pair_of(a, b), c, amount);
    if (settings_.backoff > 0) raise(pair_of(ANY, b), c, amount);
}

Trigrams::Row& Trigrams::row_for(uint64_t pair) {
    uint32_t at = index_.find(pair);
    if (at == PairIndex::NONE) {
        if (int64_t(rows_.size()) >= settings_.pairs) evict();
        at = uint32_t(rows_.size());
        rows_.push_back({});
        index_.insert(pair, at);
        Row& row = rows_.back();
        row.pair = pair;
        if (corpus_) {
            const Successors known = corpus_->find(pair);
            row.count = std::min(known.count, ROW);
            std::copy(known.token, known.token + row.count, row.token);
            std::copy(known.weight, known.weight + row.count, row.weight);
        }
    }
    rows_[at].touched = ++clock_;
    return rows_[at];
}

void Trigrams::raise(uint64_t pair, int32_t token, double amount) {
    Row& row = row_for(pair);
    int at = int(std::find(row.token, row.token + row.count, token) - row.token);
    if (at == row.count) {
        if (row.count < ROW) row.count++;
        else at = ROW - 1;  // instead of the lightest
        row.token[at] = token, row.weight[at] = 0;
    }
    if (settings_.decay < 1)
        for (int i = 0; i < row.count; i++)
            if (i != at) row.weight[i] = float(row.weight[i] * settings_.decay);
    const float weight =
        std::max(row.weight[at], float(std::min(settings_.cap, row.weight[at] + amount)));
    while (at > 0 && (row.weight[at - 1] < weight ||
                      (row.weight[at - 1] == weight && row.token[at - 1] > token))) {
        row.token[at] = row.token[at - 1], row.weight[at] = row.weight[at - 1];
        at--;
    }
    row.token[at] = token, row.weight[at] = weight;
}

// Of the pairs that were not seen for longest, the lighter half of the older half goes. Both halves
// are needed: a pair of weight counts as known, but not for ever.
void Trigrams::evict() {
    std::vector<Row*> order;
    for (Row& row : rows_) order.push_back(&row);
    const auto older = order.begin() + int64_t(order.size() + 1) / 2;
    std::nth_element(order.begin(), older - 1, order.end(),
                     [](const Row* x, const Row* y) { return x->touched < y->touched; });
    const auto gone = order.begin() + int64_t(older - order.begin() + 1) / 2;
    std::nth_element(order.begin(), gone - 1, older, [](const Row* x, const Row* y) {
        return x->weight[0] != y->weight[0] ? x->weight[0] < y->weight[0]
                                            : x->touched < y->touched;
    });
    for (auto row = order.begin(); row != gone; row++) (*row)->count = 0;
    rows_.erase(std::remove_if(rows_.begin(), rows_.end(),
                               [](const Row& row) { return row.count == 0; }),
                rows_.end());
    index_.clear(rows_.size());
    for (size_t i = 0; i < rows_.size(); i++) index_.insert(rows_[i].pair, uint32_t(i));
}

}  // namespace hasten
