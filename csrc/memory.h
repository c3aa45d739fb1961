// Operations that only move bytes: packing of weights, gathers out of them, page copies.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace hasten {

enum class Element { f32, bf16, f16 };

// A packed weight [n, k] (see LinearArgs) whose numbers are bf16 or float.
struct PackedShape {
    int64_t n, k;
    bool bf16, gated;

    int64_t panels() const {
        return gated ? (n / 2 + PANEL - 1) / PANEL * 2 : (n + PANEL - 1) / PANEL;
    }
    int64_t depth() const { return bf16 ? 2 : 1; }
    int64_t size() const { return panels() * PANEL * ((k + depth() - 1) / depth() * depth()); }
    // where the first number of an output is, and how far the next (of bf16: pair) is
    struct Place {
        int64_t first, step;
    };
    Place place(int64_t row) const;
};

// Puts rows [first, first + count) of a weight into place; f32 and f16 become float. What else is
// in their panels stays.
void pack(const void* rows, Element type, int64_t stride, int64_t first, int64_t count,
          const PackedShape& shape, void* out);
void unpack(const void* packed, const PackedShape& shape, void* out);
// rows of the unpacked matrix, as floats
void embed(const int64_t* ids, int64_t rows, const void* packed, const PackedShape& shape,
           float* out);

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
