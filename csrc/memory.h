// Operations that only move bytes: packing of weights, gathers out of them, page copies.
#pragma once

#include <cstdint>

namespace hasten {

enum class Element { f32, bf16, f16 };

// out[p][k][j] = w[16 p + j][k]; rows beyond n are zero. f32 and f16 become float.
void pack(const void* w, Element type, int64_t stride, int64_t n, int64_t k, void* out);
void unpack(const void* packed, bool bf16, int64_t n, int64_t k, void* out);
// rows of the unpacked matrix, as floats
void embed(const int64_t* ids, int64_t rows, const void* packed, bool bf16, int64_t k, float* out);

// Whole pages over all layers, pair by pair in the given order.
void copy_pages(char* data, int64_t layers, int64_t pages, int64_t page_bytes, const int64_t* src,
                const int64_t* dst, int64_t count);

struct MoveArgs {
    // [layers, pages, heads, dim, 16] and [layers, pages, heads, 16, padded]; item: bytes of an
    // element. Behind the dimensions of a page of keys lie `scales` times 16 floats.
    void *k, *v;
    int64_t layers, pages, heads, dim, padded, item, scales;
    const int32_t* table;  // [tables, groups, blocks]
    int64_t groups, blocks;
    const int32_t *table_row, *src, *dst;
    int64_t count;
};
void move_slots(const MoveArgs&);

// Bytes per second at which the threads read a buffer of `bytes` bytes: the best window of 64 MiB
// in `repeats` passes.
double read_bandwidth(int64_t bytes, int repeats);

}  // namespace hasten
