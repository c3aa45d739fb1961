// Elementwise functions of the feed-forward layers and of the final logits.
#include "gate.h"

namespace hasten {
namespace HASTEN_LEVEL {
namespace {

constexpr int64_t BLOCK = 1024;  // elements of an item

}  // namespace

void gated(const GatedArgs& a) {
    const int64_t blocks = (a.size + BLOCK - 1) / BLOCK;
    parallel(a.rows * blocks, 2, a.rows * a.size * 4, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; item++) {
            const int64_t row = item / blocks, from = item % blocks * BLOCK;
            const int64_t to = from + BLOCK < a.size ? from + BLOCK : a.size;
            const float* gate = a.x + row * a.x_stride;
            const float* up = gate + a.size;
            float* out = a.out + row * a.size;
            for (int64_t i = from; i < to; i += LANES) {
                const int n = to - i < LANES ? int(to - i) : LANES;
                const F16 g = load_first(gate + i, n);
                const F16 y = gated(a.gate, g, load_first(up + i, n));
                store_first(out + i, y, n);
            }
        }
    });
}

void softcap(const SoftcapArgs& a) {
    const int64_t blocks = (a.size + BLOCK - 1) / BLOCK;
    const F16 cap = splat(a.cap);
    parallel(blocks, 2, a.size * 4, [&](int64_t begin, int64_t end) {
        const int64_t to = end * BLOCK < a.size ? end * BLOCK : a.size;
        for (int64_t i = begin * BLOCK; i < to; i += LANES) {
            const int n = to - i < LANES ? int(to - i) : LANES;
            store_first(a.out + i, cap * tanh(load_first(a.x + i, n) / cap), n);
        }
    });
}

}  // namespace HASTEN_LEVEL
}  // namespace hasten
