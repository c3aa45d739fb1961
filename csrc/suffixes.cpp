#include "suffixes.h"

#include <algorithm>
#include <queue>

namespace hasten {
namespace {

// Compares the text at a place with some tokens; behind its end the text is smaller than anything.
int compare(const int32_t* text, int64_t n, int64_t place, const int32_t* tokens, int64_t count) {
    const int64_t there = std::min(count, n - place);
    for (int64_t i = 0; i < there; i++)
        if (text[place + i] != tokens[i]) return text[place + i] < tokens[i] ? -1 : 1;
    return there < count ? -1 : 0;
}

struct Range {
    int64_t first, last;
};

Range find(const int32_t* text, const int32_t* sorted, int64_t n, const int32_t* pattern,
           int64_t size) {
    const auto first = std::partition_point(sorted, sorted + n, [&](int32_t place) {
        return compare(text, n, place, pattern, size) < 0;
    });
    const auto last = std::partition_point(first, sorted + n, [&](int32_t place) {
        return compare(text, n, place, pattern, size) == 0;
    });
    return {first - sorted, last - sorted};
}

}  // namespace

void sort_suffixes(const int32_t* text, int64_t n, int32_t* places, int64_t count) {
    std::sort(places, places + count, [&](int32_t a, int32_t b) {
        const int64_t there = std::min(SUFFIX_DEPTH, n - std::max(a, b));
        for (int64_t i = 0; i < there; i++)
            if (text[a + i] != text[b + i]) return text[a + i] < text[b + i];
        if (there < SUFFIX_DEPTH && a != b) return a > b;  // the one that ends first is smaller
        return a < b;
    });
}

Continuations continuations(const int32_t* text, const int32_t* sorted, int64_t n,
                            const int32_t* context, int64_t size, int64_t shortest,
                            int64_t longest, int64_t length, int64_t nodes, int64_t hits) {
    Continuations found;
    Range range{0, 0};
    // An end of the context that occurs has ends that occur, too: search the longest by halving.
    int64_t low = shortest - 1, high = std::min(longest, size);
    while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        const Range there = find(text, sorted, n, context + size - middle, middle);
        if (there.first < there.last)
            low = middle, range = there;
        else
            high = middle - 1;
    }
    if (low < shortest || range.first == range.last) return found;
    const int64_t matched = found.matched = low;
    const int64_t all = range.last - range.first, count = std::min(all, hits);
    found.looked_at = count;
    // The i-th occurrence that is counted. They are in the order of what follows, so that those
    // that go on alike lie side by side, and a node of the tree is a range of them.
    const auto place = [&](int64_t i) { return int64_t(sorted[range.first + i * all / count]); };
    const auto next = [&](int64_t i, int64_t depth) {
        const int64_t at = place(i) + matched + depth;
        return at < n ? text[at] : -1;
    };
    struct Node {
        int64_t first, last, depth;
        int32_t parent, token, order;
        bool operator<(const Node& other) const {  // the most frequent one comes first
            if (last - first != other.last - other.first)
                return last - first < other.last - other.first;
            return order > other.order;
        }
    };
    std::priority_queue<Node> open;
    int32_t order = 0;
    const auto open_children = [&](int64_t first, int64_t last, int64_t depth, int32_t parent) {
        while (first < last) {
            const int32_t token = next(first, depth);
            int64_t low = first + 1, high = last;
            while (low < high) {
                const int64_t middle = (low + high) / 2;
                if (next(middle, depth) == token)
                    low = middle + 1;
                else
                    high = middle;
            }
            if (token >= 0) open.push({first, low, depth + 1, parent, token, order++});
            first = low;
        }
    };
    if (nodes > 0 && length > 0) open_children(0, count, 0, -1);
    while (!open.empty() && int64_t(found.token.size()) < nodes) {
        const Node node = open.top();
        open.pop();
        const int32_t number = int32_t(found.token.size());
        found.token.push_back(node.token);
        found.parent.push_back(node.parent);
        found.count.push_back(int32_t(node.last - node.first));
        if (node.depth < length) open_children(node.first, node.last, node.depth, number);
    }
    return found;
}

}  // namespace hasten
