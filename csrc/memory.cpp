#include "memory.h"

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>

#include "kernels.h"
#include "parallel.h"

namespace hasten {
namespace {

float widen(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

float half_to_float(uint16_t x) {
    const uint32_t sign = uint32_t(x & 0x8000) << 16, exponent = x >> 10 & 31, mantissa = x & 1023;
    uint32_t bits;
    if (exponent == 31) {
        bits = sign | 0x7f800000u | mantissa << 13;
    } else if (exponent) {
        bits = sign | (exponent + 112) << 23 | mantissa << 13;
    } else {  // zero or subnormal: mantissa * 2^-24 is exact
        const float y = float(mantissa) * 0x1p-24f;
        return sign ? -y : y;
    }
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

template <class From, class To, class Convert>
void pack_of(const From* w, int64_t stride, int64_t n, int64_t k, To* out, Convert convert) {
    const int64_t panels = (n + PAGE - 1) / PAGE, block = 64;
    parallel(panels, 1, n * k, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; p++) {
            To* panel = out + p * k * 16;
            const int64_t rows = n - p * 16 < 16 ? n - p * 16 : 16;
            for (int64_t from = 0; from < k; from += block) {
                const int64_t to = from + block < k ? from + block : k;
                for (int64_t j = 0; j < rows; j++) {
                    const From* row = w + (p * 16 + j) * stride;
                    for (int64_t i = from; i < to; i++) panel[i * 16 + j] = convert(row[i]);
                }
                for (int64_t j = rows; j < 16; j++)
                    for (int64_t i = from; i < to; i++) panel[i * 16 + j] = To(0);
            }
        }
    });
}

template <class T>
void unpack_of(const T* packed, int64_t n, int64_t k, T* out) {
    parallel(n, 16, n * k, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            const T* from = packed + row / 16 * k * 16 + row % 16;
            for (int64_t i = 0; i < k; i++) out[row * k + i] = from[i * 16];
        }
    });
}

}  // namespace

void pack(const void* w, Element type, int64_t stride, int64_t n, int64_t k, void* out) {
    switch (type) {
        case Element::f32:
            pack_of((const float*)w, stride, n, k, (float*)out, [](float x) { return x; });
            break;
        case Element::bf16:
            pack_of((const uint16_t*)w, stride, n, k, (uint16_t*)out, [](uint16_t x) { return x; });
            break;
        case Element::f16:
            pack_of((const uint16_t*)w, stride, n, k, (float*)out, half_to_float);
            break;
    }
}

void unpack(const void* packed, bool bf16, int64_t n, int64_t k, void* out) {
    if (bf16)
        unpack_of((const uint16_t*)packed, n, k, (uint16_t*)out);
    else
        unpack_of((const float*)packed, n, k, (float*)out);
}

void embed(const int64_t* ids, int64_t rows, const void* packed, bool bf16, int64_t k, float* out) {
    parallel(rows, 4, rows * k * 4, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            const int64_t at = ids[row] / 16 * k * 16 + ids[row] % 16;
            float* to = out + row * k;
            if (bf16) {
                const uint16_t* from = (const uint16_t*)packed + at;
                for (int64_t i = 0; i < k; i++) to[i] = widen(from[i * 16]);
            } else {
                const float* from = (const float*)packed + at;
                for (int64_t i = 0; i < k; i++) to[i] = from[i * 16];
            }
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
