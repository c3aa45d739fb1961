// Rows to their experts and back.
#include <cstring>
#include <stdexcept>
#include <string>

#include "ops.h"

namespace hasten {
namespace HASTEN_LEVEL {

void group_rows(const GroupArgs& a) {
    const int64_t choices = a.rows * a.top;
    for (int64_t e = 0; e <= a.experts; e++) a.offsets[e] = 0;
    for (int64_t i = 0; i < choices; i++) {
        if (a.ids[i] < 0 || a.ids[i] >= a.experts)
            throw std::out_of_range("row " + std::to_string(i / a.top) + " chose expert " +
                                    std::to_string(a.ids[i]) + ", but there are " +
                                    std::to_string(a.experts));
        a.offsets[a.ids[i] + 1]++;
    }
    for (int64_t e = 0; e < a.experts; e++) a.offsets[e + 1] += a.offsets[e];
    // an expert's offset moves on with its rows, and back again
    for (int64_t i = 0; i < choices; i++) {
        const int64_t slot = a.offsets[a.ids[i]]++;
        a.order[slot] = int32_t(i / a.top);
        a.slots[i] = int32_t(slot);
    }
    for (int64_t e = a.experts; e > 0; e--) a.offsets[e] = a.offsets[e - 1];
    a.offsets[0] = 0;
}

void gather(const GatherArgs& a) {
    for (int64_t i = 0; i < a.count; i++)
        if (a.index[i] < 0 || a.index[i] >= a.rows)
            throw std::out_of_range("index[" + std::to_string(i) + "] is " +
                                    std::to_string(a.index[i]) + ", but there are " +
                                    std::to_string(a.rows) + " rows");
    parallel(a.count, 8, a.count * a.size, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++)
            std::memcpy(a.out + i * a.size, a.x + a.index[i] * a.x_stride, size_t(a.size) * 4);
    });
}

void combine(const CombineArgs& a) {
    for (int64_t i = 0; i < a.rows * a.top; i++)
        if (a.slots[i] < 0 || a.slots[i] >= a.rows * a.top)
            throw std::out_of_range("a slot is " + std::to_string(a.slots[i]) + ", but there are " +
                                    std::to_string(a.rows * a.top));
    parallel(a.rows, 4, a.rows * a.top * a.size, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            const int32_t* slots = a.slots + row * a.top;
            // slots ascend with experts; each round takes the lowest one that is left
            const float* add = a.add ? a.add + row * a.add_stride : nullptr;
            float* out = a.out + row * a.size;
            int64_t last = -1;
            for (int64_t round = 0; round < a.top; round++) {
                int64_t next = -1;
                for (int64_t i = 0; i < a.top; i++)
                    if (slots[i] > last && (next < 0 || slots[i] < slots[next])) next = i;
                if (next < 0) break;  // the same slot twice
                last = slots[next];
                const F16 share = splat(a.shares[row * a.top + next]);
                const float* y = a.y + last * a.y_stride;
                for (int64_t i = 0; i < a.size; i += LANES) {
                    const int n = int(a.size - i < LANES ? a.size - i : LANES);
                    const F16 sum = round ? load_first(out + i, n) : zero();
                    store_first(out + i, sum + load_first(y + i, n) * share, n);
                }
            }
            for (int64_t i = 0; add && i < a.size; i += LANES) {
                const int n = int(a.size - i < LANES ? a.size - i : LANES);
                store_first(out + i, load_first(out + i, n) + load_first(add + i, n), n);
            }
        }
    });
}

}  // namespace HASTEN_LEVEL
}  // namespace hasten
