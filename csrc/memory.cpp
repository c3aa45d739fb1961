#include "memory.h"

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>

#include "half.h"
#include "parallel.h"

namespace hasten {
namespace {

float widen(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

template <class From, class To, class Convert>
void pack_of(const From* rows, int64_t stride, int64_t first, int64_t count,
             const PackedShape& shape, To* out, Convert convert) {
    const int64_t block = 64, depth = shape.depth();
    parallel(count, 16, count * shape.k, [&](int64_t begin, int64_t end) {
        // rows of a panel side by side while a block of k of it is in the cache
        for (int64_t panel = begin; panel < end; panel += PANEL)
            for (int64_t from = 0; from < shape.k; from += block) {
                const int64_t to = from + block < shape.k ? from + block : shape.k;
                for (int64_t row = panel; row < panel + PANEL && row < end; row++) {
                    const From* source = rows + row * stride;
                    const auto place = shape.place(first + row);
                    To* target = out + place.first + from / depth * place.step;
                    if (depth == 1)
                        for (int64_t i = from; i < to; i++, target += place.step)
                            *target = convert(source[i]);
                    else
                        for (int64_t i = from; i < to; i += 2, target += place.step) {
                            target[0] = convert(source[i]);
                            if (i + 1 < to) target[1] = convert(source[i + 1]);
                        }
                }
            }
    });
}

// calls take(i, number) for all i of a row
template <class T, class Take>
void read_row(const T* packed, const PackedShape& shape, int64_t row, const Take& take) {
    const auto place = shape.place(row);
    const T* from = packed + place.first;
    if (shape.depth() == 1)
        for (int64_t i = 0; i < shape.k; i++, from += place.step) take(i, *from);
    else
        for (int64_t i = 0; i < shape.k; i += 2, from += place.step) {
            take(i, from[0]);
            if (i + 1 < shape.k) take(i + 1, from[1]);
        }
}

template <class T>
void unpack_of(const T* packed, const PackedShape& shape, T* out) {
    parallel(shape.n, 16, shape.n * shape.k, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++)
            read_row(packed, shape, row, [&](int64_t i, T x) { out[row * shape.k + i] = x; });
    });
}

}  // namespace

PackedShape::Place PackedShape::place(int64_t row) const {
    int64_t panel = row / PANEL, lane = row % PANEL;
    if (gated) {
        const int64_t half = n / 2, in_half = row % half;
        panel = in_half / PANEL * 2 + row / half, lane = in_half % PANEL;
    }
    const int64_t group = panel / GROUP * GROUP;
    const int64_t in_group = panels() - group < GROUP ? panels() - group : GROUP;
    const int64_t whole_k = (k + depth() - 1) / depth() * depth();
    return {group * PANEL * whole_k + (panel - group) * PANEL * depth() + lane * depth(),
            in_group * PANEL * depth()};
}

void pack(const void* rows, Element type, int64_t stride, int64_t first, int64_t count,
          const PackedShape& shape, void* out) {
    switch (type) {
        case Element::f32:
            pack_of((const float*)rows, stride, first, count, shape, (float*)out,
                    [](float x) { return x; });
            break;
        case Element::bf16:
            pack_of((const uint16_t*)rows, stride, first, count, shape, (uint16_t*)out,
                    [](uint16_t x) { return x; });
            break;
        case Element::f16:
            pack_of((const uint16_t*)rows, stride, first, count, shape, (float*)out, half_to_float);
            break;
    }
}

void unpack(const void* packed, const PackedShape& shape, void* out) {
    if (shape.bf16)
        unpack_of((const uint16_t*)packed, shape, (uint16_t*)out);
    else
        unpack_of((const float*)packed, shape, (float*)out);
}

void embed(const int64_t* ids, int64_t rows, const void* packed, const PackedShape& shape,
           float* out) {
    parallel(rows, 4, rows * shape.k * 4, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            float* to = out + row * shape.k;
            if (shape.bf16)
                read_row((const uint16_t*)packed, shape, ids[row],
                         [=](int64_t i, uint16_t x) { to[i] = widen(x); });
            else
                read_row((const float*)packed, shape, ids[row],
                         [=](int64_t i, float x) { to[i] = x; });
        }
    });
}

void copy_pages(char* data, int64_t layers, int64_t pages, int64_t page_bytes, const int64_t* src,
                const int64_t* dst, int64_t count) {
    parallel(layers, 1, layers * count * page_bytes / 16, [&](int64_t begin, int64_t end) {
        for (int64_t layer = begin; layer < end; layer++) {
            char* base = data + layer * pages * page_bytes;
            for (int64_t i = 0; i < count; i++)
                if (src[i] != dst[i])
                    std::memcpy(base + dst[i] * page_bytes, base + src[i] * page_bytes,
                                size_t(page_bytes));
        }
    });
}

namespace {

template <class T>
void move_slots_of(const MoveArgs& a) {
    const int64_t row_bytes = a.padded * int64_t(sizeof(T));
    const int64_t k_page = a.dim * PAGE * int64_t(sizeof(T)) + a.scales * PAGE * 4;
    parallel(a.layers, 1, a.layers * a.count * a.groups * a.heads * a.dim * 2,
             [&](int64_t begin, int64_t end) {
        for (int64_t layer = begin; layer < end; layer++)
            for (int64_t i = 0; i < a.count; i++)
                for (int64_t h = 0; h < a.groups * a.heads; h++) {
                    const int32_t* pages =
                        a.table + (a.table_row[i] * a.groups + h / a.heads) * a.blocks;
                    const int64_t from_slot = a.src[i], to_slot = a.dst[i];
                    const int64_t from = (layer * a.pages + pages[from_slot / PAGE]) * a.heads +
                                         h % a.heads;
                    const int64_t to =
                        (layer * a.pages + pages[to_slot / PAGE]) * a.heads + h % a.heads;
                    const char* page_from = (const char*)a.k + from * k_page;
                    char* page_to = (char*)a.k + to * k_page;
                    const T* k_from = (const T*)page_from + from_slot % PAGE;
                    T* k_to = (T*)page_to + to_slot % PAGE;
                    for (int64_t d = 0; d < a.dim; d++) k_to[d * PAGE] = k_from[d * PAGE];
                    const int64_t scales = a.dim * PAGE * int64_t(sizeof(T));
                    for (int64_t s = 0; s < a.scales; s++)
                        std::memcpy(page_to + scales + (s * PAGE + to_slot % PAGE) * 4,
                                    page_from + scales + (s * PAGE + from_slot % PAGE) * 4, 4);
                    std::memmove((T*)a.v + (to * PAGE + to_slot % PAGE) * a.padded,
                                 (const T*)a.v + (from * PAGE + from_slot % PAGE) * a.padded,
                                 size_t(row_bytes));
                }
    });
}

}  // namespace

void move_slots(const MoveArgs& a) {
    switch (a.item) {
        case 1: move_slots_of<uint8_t>(a); break;
        case 2: move_slots_of<uint16_t>(a); break;
        default: move_slots_of<uint32_t>(a);
    }
}

double read_bandwidth(int64_t bytes, int repeats) {
    const int64_t block = 1 << 18;  // floats an item
    const int64_t items = bytes / (block * 4) > 0 ? bytes / (block * 4) : 1;
    float* data = (float*)std::malloc(size_t(items * block) * 4);
    if (!data) throw std::bad_alloc();
    parallel(items, 8, items * block, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * block; i < end * block; i++) data[i] = 1.0f;
    });
    // windows short enough to fit between interruptions of a busy machine; each is read again
    // only after all the others, so the buffer's size decides which memory is measured
    const int64_t window = 64;
    double best = 0.0;
    volatile double sink = 0.0;
    const Kernels& table = kernels();
    for (int i = 0; i < repeats; i++)
        for (int64_t first = 0; first < items; first += window) {
            const int64_t count = items - first < window ? items - first : window;
            if (count < window && first > 0) break;
            const auto start = std::chrono::steady_clock::now();
            parallel(count, 1, count * block, [&](int64_t begin, int64_t end) {
                const float* from = data + (first + begin) * block;
                const double total = table.read(from, (end - begin) * block);
                if (total < 0.0) sink = total;
            });
            const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
            const double rate = double(count * block * 4) / time.count();
            if (rate > best) best = rate;
        }
    std::free(data);
    return best;
}

}  // namespace hasten
