// The largest few of many numbers. Compiled once, for any processor: operations of an instruction
// set call it, since templates of the standard library must not be compiled for theirs.
#pragma once

#include <cstdint>
#include <cstring>

namespace hasten {

// Orders by value descending, then by id ascending: the smaller key goes first. -0 equals 0.
inline uint64_t key_of(float value, uint32_t id) {
    value = value + 0.0f;
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint32_t rising = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return uint64_t(~rising) << 32 | id;
}

// The k-th largest value, 1 <= k <= count; `room` holds as many.
float kth_largest(const float* values, int64_t count, int64_t k, float* room);

// Brings the k smallest keys to the front, in ascending order.
void first_keys(uint64_t* keys, int64_t count, int64_t k);

}  // namespace hasten
