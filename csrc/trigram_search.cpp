// The two searches over a table of tri-grams.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <queue>
#include <tuple>

#include "trigrams.h"

namespace hasten {
namespace {

// SplitMix64 of a counter: the number depends on the key and the count alone.
double uniform(uint64_t key, uint64_t count) {
    uint64_t z = key + (count + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return double((z ^ z >> 31) >> 11) * 0x1p-53;
}

struct Node {
    int32_t token, parent;
    double w;
    int32_t depth;
    int32_t first = -1, count = 0;  // children; first stays -1 until they are made
    int32_t visits = 0;
    int32_t place = -1;  // in the draft
    double value = 0;    // sum over the visits
};

// A draft that grows in any order within its budget.
class Growing {
  public:
    Growing(int32_t root, int budget) : left_(budget), nodes_{{root, -1, 0}} {}
    bool full() const { return left_ <= 0; }

    int add(int parent, int32_t token) {
        left_--;
        nodes_.push_back({token, parent, nodes_[size_t(parent)].depth + 1});
        return int(nodes_.size()) - 1;
    }

    Draft by_depth() const {
        std::vector<int> order(nodes_.size()), place(nodes_.size());
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(),
                         [&](int x, int y) { return nodes_[x].depth < nodes_[y].depth; });
        Draft draft;
        for (int at : order) {
            place[at] = int(draft.token.size());
            draft.token.push_back(nodes_[at].token);
            draft.parent.push_back(at ? place[nodes_[at].parent] : -1);
        }
        return draft;
    }

  private:
    struct Place {
        int32_t token;
        int parent, depth;
    };
    int left_;
    std::vector<Place> nodes_;
};

class TreeSearch {
  public:
    TreeSearch(const Trigrams& table, int32_t a, int32_t b, uint64_t key)
        : table_(table), s_(table.settings()), a_(a), key_(key) {
        nodes_.clear(), mean_.clear(), share_.clear();
        make(b, -1, 0, 0);
    }

    void iterate(int iteration) {
        int at = 0;
        while (nodes_[at].depth < s_.depth && nodes_[at].count) at = best_child(at);
        if (nodes_[at].depth < s_.depth && expand(at)) at = nodes_[at].first;
        const double value = 1.0 + path_weight(at) + roll_out(at, iteration);
        for (int i = at; i >= 0; i = nodes_[i].parent) {
            Node& node = nodes_[i];
            node.visits++, node.value += value;
            mean_[i] = node.value / node.visits;
            share_[i] = node.w / (1 + node.visits);
        }
    }

    Draft draft(int budget) {
        std::vector<int32_t> order;
        for (size_t i = 0; i < nodes_.size(); i++)
            if (nodes_[i].visits) order.push_back(int32_t(i));
        // a parent has at least its child's visits, the same mean where it has no more, and a
        // lower number: it comes first
        const size_t kept = std::min(order.size(), size_t(s_.prefixes));
        std::partial_sort(order.begin(), order.begin() + int64_t(kept), order.end(),
                          [&](int32_t x, int32_t y) {
                              if (nodes_[x].visits != nodes_[y].visits)
                                  return nodes_[x].visits > nodes_[y].visits;
                              return mean_[x] != mean_[y] ? mean_[x] > mean_[y] : x < y;
                          });
        Growing out(nodes_[0].token, budget);
        nodes_[0].place = 0;
        for (size_t i = 0; i < kept && !out.full(); i++) {
            put(order[i], out);
            if (out.full()) break;
            Node& node = nodes_[order[i]];
            if (node.count) {
                put(node.first, out);
            } else {
                const View view = table_.find(before(order[i]), node.token);
                if (view.row.count) out.add(node.place, view.row.token[0]);
            }
        }
        return out.by_depth();
    }

  private:
    void make(int32_t token, int32_t parent, double w, int32_t depth) {
        Node node{token, parent, w, depth};
        nodes_.push_back(node);
        mean_.push_back(std::numeric_limits<double>::infinity());
        share_.push_back(w);
    }

    int32_t before(int at) const { return at ? nodes_[nodes_[at].parent].token : a_; }

    // The child of the largest score; the first of equal ones, which is the heaviest.
    int best_child(int at) const {
        const Node& node = nodes_[at];
        const double explore = table_.exploration()[size_t(node.visits)];
        int best = node.first;
        double highest = -1;
        for (int i = node.first; i < node.first + node.count; i++) {
            const double score = mean_[i] + explore * share_[i];
            if (score > highest) highest = score, best = i;
        }
        return best;
    }

    bool expand(int at) {
        if (nodes_[at].first >= 0) return false;  // a dead end, found before
        const View view = table_.find(before(at), nodes_[at].token);
        nodes_[at].first = int32_t(nodes_.size()), nodes_[at].count = view.row.count;
        const int32_t depth = nodes_[at].depth + 1;
        for (int i = 0; i < view.row.count; i++)
            make(view.row.token[i], at, view.scale * view.row.weight[i], depth);
        return view.row.count > 0;
    }

    double path_weight(int at) const {
        double sum = 0;
        for (; at > 0; at = nodes_[at].parent) sum += nodes_[at].w;
        return sum;
    }

    // The weights of tokens drawn in proportion to theirs, until the path is full or ends.
    double roll_out(int at, int iteration) const {
        int32_t a = before(at), b = nodes_[at].token;
        double sum = 0;
        for (int depth = nodes_[at].depth; depth < s_.depth; depth++) {
            const View view = table_.find(a, b);
            if (!view.row.count) break;
            double total = 0;
            for (int i = 0; i < view.row.count; i++) total += view.row.weight[i];
            double left = total * uniform(key_, uint64_t(iteration) * s_.depth + depth);
            int i = 0;
            while (i < view.row.count - 1 && (left -= view.row.weight[i]) >= 0) i++;
            sum += view.scale * view.row.weight[i];
            a = b, b = view.row.token[i];
        }
        return sum;
    }

    void put(int at, Growing& out) {
        Node& node = nodes_[at];
        if (node.place < 0) node.place = out.add(nodes_[node.parent].place, node.token);
    }

    const Trigrams& table_;
    const TrigramSettings& s_;
    const int32_t a_;
    const uint64_t key_;
    // of the nodes; the last two are value / visits and w / (1 + visits). Their memory is used again.
    static thread_local std::vector<Node> nodes_;
    static thread_local std::vector<double> mean_, share_;
};

thread_local std::vector<Node> TreeSearch::nodes_;
thread_local std::vector<double> TreeSearch::mean_, TreeSearch::share_;

}  // namespace

double exploration(const TrigramSettings& s, int visits) {
    return (s.c1 + std::log((visits + s.c2 + 1) / s.c2)) * std::sqrt(double(visits));
}

Draft search_tree(const Trigrams& table, int32_t a, int32_t b, int budget, uint64_t key) {
    if (budget < 1 || !table.find(a, b).row.count) return Growing(b, 0).by_depth();
    TreeSearch search(table, a, b, key);
    for (int i = 0; i < table.settings().iterations; i++) search.iterate(i);
    return search.draft(budget);
}

Draft search_beam(const Trigrams& table, int32_t a, int32_t b, int budget) {
    struct Open {
        double share;  // of the whole path
        int64_t order;
        int parent, depth;
        int32_t before, token;
        bool operator<(const Open& other) const {
            return std::tie(share, other.order) < std::tie(other.share, order);
        }
    };
    std::priority_queue<Open> open;
    int64_t count = 0;
    Growing out(b, budget);
    auto reach = [&](double share, int at, int depth, int32_t before, int32_t token) {
        if (depth > table.settings().depth) return;
        const View view = table.find(before, token);
        double total = 0;
        for (int i = 0; i < view.row.count; i++) total += view.row.weight[i];
        if (!(total > 0)) return;
        for (int i = 0; i < view.row.count; i++)
            open.push({share * (view.row.weight[i] / total), count++, at, depth + 1, token,
                       view.row.token[i]});
    };
    reach(1.0, 0, 0, a, b);
    while (!open.empty() && !out.full()) {
        const Open next = open.top();
        open.pop();
        const int at = out.add(next.parent, next.token);
        reach(next.share, at, next.depth, next.before, next.token);
    }
    return out.by_depth();
}

}  // namespace hasten
