// Weights kept as the blocks of GGUF files, in the order in which the kernels read them.
//
// A packed weight is one stream of as many bytes as the blocks have. Outputs are padded to *strips*
// of 64, four panels of 16. A strip is a row of *spans* of 256 inputs (the last may be shorter where
// blocks have 32 values); a span of B groups of 32 inputs holds
//
// - headers [4 panels], what scales the codes, [..][16 outputs]:
//     Q8_0, Q4_0: d, float16 [B][16]
//     Q4_K: d and dmin, float16 [16] each, then the block's twelve bytes of scales [12][16]
//     Q6_K: d, float16 [16], then the block's scales, int8 [16][16]
// - codes [B][4 panels], where a line is [16 outputs][4 inputs] and step s has inputs 4 s to 4 s + 3:
//     Q8_0: code + 128 as bytes, lines of steps 0 to 7
//     Q4_0, Q4_K: lines t = 0 to 3, low halves are step 2 t, high halves step 2 t + 1
//     Q6_K: the same with the lower 4 bits, then lines u = 0, 1 with the upper 2 bits of steps
//       4 u to 4 u + 3, the lowest first
//
// Codes are stored unsigned, since the instructions that multiply bytes take one unsigned operand.
// Source of the blocks: ggml-common.h of ggml.
#pragma once

#include <cstdint>

namespace hasten {

enum class Block { q8_0, q4_0, q4_k, q6_k };

constexpr int STRIP_OUTPUTS = 64, STRIP_PANELS = 4, SPAN = 256, SUB = 32;

// values and bytes of a block, and what is subtracted from an unsigned code
constexpr int block_values(Block b) { return b == Block::q8_0 || b == Block::q4_0 ? 32 : 256; }
constexpr int block_bytes(Block b) {
    return b == Block::q8_0 ? 34 : b == Block::q4_0 ? 18 : b == Block::q4_k ? 144 : 210;
}
constexpr int block_zero(Block b) {
    return b == Block::q8_0 ? 128 : b == Block::q4_0 ? 8 : b == Block::q4_k ? 0 : 32;
}
// bytes of a panel's header in a span of `subs` groups of 32, and of a panel's codes in a group
constexpr int64_t header_bytes(Block b, int64_t subs) {
    return b == Block::q4_k ? 256 : b == Block::q6_k ? 288 : 32 * subs;
}
constexpr int64_t code_bytes(Block b) {
    return b == Block::q8_0 ? 512 : b == Block::q6_k ? 384 : 256;
}
constexpr int64_t row_bytes(Block b, int64_t k) { return k / block_values(b) * block_bytes(b); }
// With a gate, panels of the first and of the second half of the n outputs alternate.
constexpr int64_t panels_of(int64_t n, bool gated) {
    return gated ? 2 * ((n / 2 + 15) / 16) : (n + 15) / 16;
}
constexpr int64_t strips_of(int64_t n, bool gated) {
    return (panels_of(n, gated) + STRIP_PANELS - 1) / STRIP_PANELS;
}

struct BlockStream {
    uint8_t* data;
    Block kind;
    int64_t n, k;
    bool gated;

    int64_t bytes() const { return strips_of(n, gated) * STRIP_OUTPUTS * row_bytes(kind, k); }
};

// rows [count, row_bytes] of a file into a stream, as outputs `first` and following
void pack_blocks(const BlockStream& w, const uint8_t* rows, int64_t stride, int64_t first,
                 int64_t count);
// the values of some outputs, float [count, k], as ggml computes them
void unpack_blocks(const BlockStream& w, const int64_t* ids, int64_t count, float* out);

}  // namespace hasten
