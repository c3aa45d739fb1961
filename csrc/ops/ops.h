// The operations of one instruction set; each is defined in the file of its name.
#pragma once

#include "../kernels.h"
#include "../parallel.h"
#include "../simd.h"

namespace hasten {
namespace HASTEN_LEVEL {

void linear(const LinearArgs&, const LinearPart* parts, int64_t count);
void linear_blocks(const BlocksArgs&, const LinearPart* parts, int64_t count);
void linear_int8(const QuantizedArgs&, const LinearPart* parts, int64_t count);
void linear_int4(const QuantizedArgs&, const LinearPart* parts, int64_t count);
#if defined(__AVX512F__)
void linear_blocks_vnni(const BlocksArgs&, const LinearPart* parts, int64_t count);
void linear_int8_vnni(const QuantizedArgs&, const LinearPart* parts, int64_t count);
void linear_int4_vnni(const QuantizedArgs&, const LinearPart* parts, int64_t count);
#endif
void rms_norm(const NormArgs&);
void add(const AddArgs&);
void gated(const GatedArgs&);
void softcap(const SoftcapArgs&);
void row_top(const RowTopArgs&);
void sum_exp(const SumExpArgs&);
void route(const RouteArgs&);
void group_rows(const GroupArgs&);
void gather(const GatherArgs&);
void combine(const CombineArgs&);
void rtn(const RtnArgs&);
void append(const AppendArgs&);
void attention(const AttentionArgs&);
void vector_math(const float* x, int64_t size, bool tanh, float* out);
double read(const float* data, int64_t size);

}  // namespace HASTEN_LEVEL
}  // namespace hasten
