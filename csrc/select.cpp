#include "select.h"

#include <algorithm>
#include <functional>

namespace hasten {

float kth_largest(const float* values, int64_t count, int64_t k, float* room) {
    std::copy(values, values + count, room);
    std::nth_element(room, room + k - 1, room + count, std::greater<float>());
    return room[k - 1];
}

void first_keys(uint64_t* keys, int64_t count, int64_t k) {
    if (k < count) std::nth_element(keys, keys + k - 1, keys + count);
    std::sort(keys, keys + std::min(k, count));
}

}  // namespace hasten
