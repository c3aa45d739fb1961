// What an operation gets and the table of operations of one instruction set. Arguments are
// checked by the bindings; strides are in elements; every innermost dimension is contiguous.
#pragma once

#include <cstdint>

#include "blocks.h"

namespace hasten {

constexpr int PAGE = 16;   // positions in a page  (hasten.cache.layout.PAGE_SIZE)
constexpr int CHUNK = 64;  // positions in a chunk (hasten.cache.layout.CHUNK)

constexpr int PANEL = 16;  // outputs that stand side by side in a packed weight
constexpr int GROUP = 4;   // panels that are read together

enum class Gate { none, silu, gelu_tanh };

// What several matrices of one call have in common. A packed weight is one stream: groups of GROUP
// panels (the last one may be narrower), in a group [k][panels][PANEL] floats, or
// [ceil(k / 2)][panels][PANEL][2] bf16, in which one output's two neighbours in k share a word.
// Outputs beyond n are zero. With a gate, panels of the first and of the second half of the n
// outputs alternate, and there are n / 2 results: act(first) * second.
struct LinearArgs {
    int64_t n, k;
    bool w_bf16;
    Gate gate = Gate::none;
    int64_t x_stride = 0, out_stride = 0, add_stride = 0;
};

// One matrix and the rows that go through it.
struct LinearPart {
    const float* x;  // [rows, k]
    int64_t rows;
    const void* w;      // packed [n, k]
    const float* bias;  // [n] or null
    const float* add;   // [rows, n] or null, added last
    float* out;         // [rows, n], or [rows, n / 2] with a gate
};

// Weights of 8 and 4 bits: streams as hasten.kernels.linear.quantized describes them.
struct QuantizedArgs {
    int64_t n, k;
    int64_t group;    // inputs that share a scale; k for int8
    bool asymmetric;  // int4 with a zero beside each scale
    Gate gate = Gate::none;
    int64_t x_stride = 0, out_stride = 0, add_stride = 0;
};

// Weights that are blocks of a GGUF file: streams as blocks.h describes them.
struct BlocksArgs {
    Block kind;
    int64_t n, k;
    Gate gate = Gate::none;
    int64_t x_stride = 0, out_stride = 0, add_stride = 0;
};

struct NormArgs {
    const float* x;  // [outer, inner, size]
    int64_t x_outer, x_inner;
    const float* residual;  // as x, or null
    int64_t residual_outer, residual_inner;
    const float* weight;  // [size]
    float eps;
    int64_t outer, inner, size;
    float* out;
    int64_t out_outer, out_inner;
    float* sum;  // x + residual, contiguous; null without a residual
    const float* add;  // as x, added to the result, or null
    int64_t add_outer, add_inner;
};

// out = x * factor, or x * factor + y
struct AddArgs {
    const float* x;  // [outer, inner, size]
    int64_t x_outer, x_inner;
    float factor;
    const float* y;  // as x, or null
    int64_t y_outer, y_inner;
    int64_t outer, inner, size;
    float* out;
    int64_t out_outer, out_inner;
};

struct GatedArgs {
    const float* x;  // [rows, 2 * size]: gate, up
    int64_t x_stride, rows, size;
    Gate gate;
    float* out;  // [rows, size]
};

struct SoftcapArgs {
    const float* x;
    int64_t size;
    float cap;
    float* out;
};

struct RowTopArgs {
    const float* x;  // [rows, size]
    int64_t x_stride, rows, size;
    int64_t* argmax;
    float *max, *lse;
    int64_t k;     // at most size
    int64_t* ids;  // [rows, k]
};

// sum over a row of exp((x - shift) / temperature)
struct SumExpArgs {
    const float* x;  // [rows, size]
    int64_t x_stride, rows, size;
    const float* shift;  // [rows]
    double temperature;
    double* sum;  // [rows]
};

struct RouteArgs {
    const float* x;  // [rows, experts]
    int64_t x_stride, rows, experts, top;
    bool normalize;
    int32_t* ids;  // [rows, top]
    float* weights;
    int64_t groups, top_groups;  // equal runs of experts, and how many of them are chosen from
};

// Sorts the choices of all rows by expert, then by row.
struct GroupArgs {
    const int32_t* ids;  // [rows, top]
    int64_t rows, top, experts;
    int64_t* offsets;  // [experts + 1]: where an expert's rows begin
    int32_t* order;    // [rows * top]: the row of each place
    int32_t* slots;    // [rows, top]: the place of each choice
};

struct GatherArgs {
    const float* x;  // [rows, size]
    int64_t x_stride, rows, size;
    const int32_t* index;  // [count]
    int64_t count;
    float* out;  // [count, size]
};

// out[r] = sum over choices c, by ascending slot, of shares[r, c] * y[slots[r, c]], plus add[r]
struct CombineArgs {
    const float* y;  // [rows * top, size]
    int64_t y_stride, rows, top, size;
    const int32_t* slots;  // [rows, top], of which no two of a row are equal
    const float* shares;   // [rows, top]
    const float* add;      // [rows, size] or null
    int64_t add_stride;
    float* out;  // [rows, size]
};

// How a page holds numbers. i8: a key (or value) is its codes times one scale.
enum class Stored { f32, bf16, i8 };

// Rows behind the dimensions of an i8 key page, which are PAGE floats each four of them: the scales
// of its keys and, where values are stored, those of its values.
constexpr int SCALE_ROWS = 4;

// Page tables and the pages of one layer.
struct Pages {
    void* k;  // [pages, heads, dim + scale_rows, PAGE]
    void* v;  // [pages, heads, PAGE, padded]; padded 0: values are the keys' last v_dim dimensions
    Stored type;
    int64_t pages, heads, dim, v_dim, padded;
    const int32_t* table;  // [tables, groups, blocks]
    int64_t tables, groups, blocks;

    int64_t item() const { return type == Stored::f32 ? 4 : type == Stored::bf16 ? 2 : 1; }
    int64_t scale_rows() const {
        return type == Stored::i8 ? SCALE_ROWS * (padded ? 2 : 1) : 0;
    }
    // bytes of a page of one head
    int64_t k_page() const { return (dim + scale_rows()) * PAGE * item(); }
    int64_t v_page() const { return PAGE * padded * item(); }
};

// A root-mean-square norm of spans of numbers, each as long as the weight.
struct Norm {
    const float* weight;  // [size] or null: none
    int64_t size;
};

struct AppendArgs {
    Pages pages;
    float* q;  // [rows, q_heads, dim]
    int64_t q_stride, q_heads;
    const float *k, *v;  // [rows, groups * heads, dim] and [.., v_dim]
    int64_t k_stride, v_stride;
    Norm q_norm, k_norm;  // before the rotation, of a row's queries and of its keys
    float eps;
    const float *cos, *sin;  // [angles, half]
    int64_t angles, half, rows;
    bool rotate_keys;  // or store them as they are
    const int32_t *positions, *slots, *table_row;
};

struct AttentionArgs {
    Pages pages;
    const float* q;  // [rows, q_heads, dim]
    int64_t q_stride, q_heads, rows;
    const int32_t *table_row, *positions, *base;
    const uint64_t* mask;  // [rows, words]
    int64_t words;
    float scale, softcap;   // softcap 0: none
    int64_t window, sinks;  // window 0: none
    // keys are stored before the rotation, whose angles are those of their positions:
    const float *cos, *sin;  // [position / PAGE, half, position % PAGE], or null
    int64_t half;
    int64_t end, work;  // one more than the highest position that is read; multiply-adds
    float* out;        // [rows, q_heads, v_dim]
    float* lse;        // [rows, q_heads] or null
    int64_t* missing;  // set to 1 + row * blocks + block of a row that needs a page it lacks
};

// Rows rounded to the nearest of their codes: int8 without a group, else 4 bits.
struct RtnArgs {
    const void* x;  // [rows, k], float or bf16
    bool x_bf16;
    int64_t x_stride, rows, k, group;
    const float* clip;  // [clips]: shares of the full range that are tried
    int64_t clips;
    void* codes;    // [rows, k] int8, or bytes below 16
    void* scale;    // [rows] float, or [rows, k / group] float16
    uint8_t* zero;  // as scale, or null: 8
    int* bad;       // set where a value or scale is not finite
};

struct Kernels {
    void (*linear)(const LinearArgs&, const LinearPart* parts, int64_t count);
    void (*linear_blocks)(const BlocksArgs&, const LinearPart* parts, int64_t count);
    void (*linear_int8)(const QuantizedArgs&, const LinearPart* parts, int64_t count);
    void (*linear_int4)(const QuantizedArgs&, const LinearPart* parts, int64_t count);
    void (*rms_norm)(const NormArgs&);
    void (*add)(const AddArgs&);
    void (*gated)(const GatedArgs&);
    void (*softcap)(const SoftcapArgs&);
    void (*row_top)(const RowTopArgs&);
    void (*sum_exp)(const SumExpArgs&);
    void (*route)(const RouteArgs&);
    void (*group_rows)(const GroupArgs&);
    void (*gather)(const GatherArgs&);
    void (*combine)(const CombineArgs&);
    void (*rtn)(const RtnArgs&);
    void (*append)(const AppendArgs&);
    void (*attention)(const AttentionArgs&);
    void (*vector_math)(const float* x, int64_t size, bool tanh, float* out);  // for tests
    double (*read)(const float* data, int64_t size);  // sum, for the bandwidth probe
};

// isa.cpp
const Kernels& kernels();
const char* isa();
const char* set_isa(const char* name);  // null, or why not
bool isa_supported(const char* name);

}  // namespace hasten
