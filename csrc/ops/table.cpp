#include "ops.h"

namespace hasten {
namespace HASTEN_LEVEL {

// eight streams with prefetch, as the linear layer reads weights
double read(const float* data, int64_t size) {
    constexpr int STREAMS = 8;
    const int64_t length = size / STREAMS / LANES * LANES;
    F16 total[STREAMS] = {zero(), zero(), zero(), zero(), zero(), zero(), zero(), zero()};
    for (int64_t i = 0; i < length; i += LANES)
        for (int j = 0; j < STREAMS; j++) {
            const float* at = data + j * length + i;
            __builtin_prefetch(at + 512, 0, 3);
            total[j] = total[j] + load(at);
        }
    F16 all = zero();
    for (int j = 0; j < STREAMS; j++) all = all + total[j];
    return sum(all);
}

void vector_math(const float* x, int64_t size, bool use_tanh, float* out) {
    for (int64_t i = 0; i < size; i += LANES) {
        int n = size - i < LANES ? int(size - i) : LANES;
        F16 y = load_first(x + i, n);
        store_first(out + i, use_tanh ? tanh(y) : exp(y), n);
    }
}

extern const Kernels table;
const Kernels table = {linear,  linear_blocks, linear_int8, linear_int4, rms_norm,    add,
                       gated,   softcap,       row_top,     sum_exp,     route,       group_rows,
                       gather,  combine,       rtn,         append,      attention,   vector_math,
                       read};

#if defined(__AVX512F__)
static Kernels with_vnni() {
    Kernels k = table;
    k.linear_blocks = linear_blocks_vnni;
    k.linear_int8 = linear_int8_vnni;
    k.linear_int4 = linear_int4_vnni;
    return k;
}
extern const Kernels table_vnni;
const Kernels table_vnni = with_vnni();
#endif

}  // namespace HASTEN_LEVEL
}  // namespace hasten
