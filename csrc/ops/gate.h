// act(gate) * up, as feed-forward layers need it.
#pragma once

#include "ops.h"

namespace hasten {
namespace HASTEN_LEVEL {

HASTEN_INLINE F16 silu(F16 x) { return x / (splat(1.0f) + exp(zero() - x)); }

// the tanh form of GELU
HASTEN_INLINE F16 gelu_tanh(F16 x) {
    F16 cubic = fma(x * x * splat(0.044715f), x, x);
    F16 t = tanh(cubic * splat(0.797884561f));  // sqrt(2 / pi)
    return splat(0.5f) * x * (splat(1.0f) + t);
}

HASTEN_INLINE F16 gated(Gate kind, F16 gate, F16 up) {
    return (kind == Gate::silu ? silu(gate) : gelu_tanh(gate)) * up;
}

}  // namespace HASTEN_LEVEL
}  // namespace hasten
