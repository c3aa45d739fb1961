#include "blocks.h"

#include <cstring>

#include "half.h"
#include "parallel.h"

namespace hasten {
namespace {

// What a file's block holds: unsigned codes in the order of inputs, and the header's bytes.
struct Unpacked {
    uint8_t codes[SPAN];
    const uint8_t *d, *dmin, *scales;
};

template <Block B>
void read_block(const uint8_t* block, Unpacked& u) {
    if (B == Block::q8_0) {
        u.d = block;
        for (int i = 0; i < 32; i++) u.codes[i] = uint8_t(block[2 + i] ^ 128);
    } else if (B == Block::q4_0) {
        u.d = block;
        for (int i = 0; i < 16; i++) {
            u.codes[i] = block[2 + i] & 15;
            u.codes[16 + i] = block[2 + i] >> 4;
        }
    } else if (B == Block::q4_k) {
        u.d = block, u.dmin = block + 2, u.scales = block + 4;
        for (int pair = 0; pair < 4; pair++)
            for (int i = 0; i < 32; i++) {
                const uint8_t both = block[16 + pair * 32 + i];
                u.codes[pair * 64 + i] = both & 15;
                u.codes[pair * 64 + 32 + i] = both >> 4;
            }
    } else {
        u.d = block + 208, u.scales = block + 192;
        for (int half = 0; half < 2; half++)
            for (int i = 0; i < 32; i++) {
                const uint8_t a = block[half * 64 + i], b = block[half * 64 + 32 + i];
                const uint8_t high = block[128 + half * 32 + i];
                uint8_t* to = u.codes + half * 128 + i;
                to[0] = uint8_t((a & 15) | (high & 3) << 4);
                to[32] = uint8_t((b & 15) | (high >> 2 & 3) << 4);
                to[64] = uint8_t(a >> 4 | (high >> 4 & 3) << 4);
                to[96] = uint8_t(b >> 4 | (high >> 6) << 4);
            }
    }
}

uint32_t four(const uint8_t* p) {
    uint32_t x;
    std::memcpy(&x, p, 4);
    return x;
}

void put_four(uint8_t* p, uint32_t x) { std::memcpy(p, &x, 4); }

// 32 codes of one output to their lines, and back; `at` is the output's place in the first line
template <Block B>
void put_codes(const uint8_t* codes, uint8_t* at) {
    if (B == Block::q8_0) {
        for (int s = 0; s < 8; s++) put_four(at + s * 64, four(codes + 4 * s));
        return;
    }
    const uint32_t low = 0x0f0f0f0fu, two = 0x03030303u;
    for (int t = 0; t < 4; t++)
        put_four(at + t * 64, (four(codes + 8 * t) & low) | (four(codes + 8 * t + 4) & low) << 4);
    if (B == Block::q6_k)
        for (int u = 0; u < 2; u++) {
            uint32_t word = 0;
            for (int s = 0; s < 4; s++)
                word |= (four(codes + 16 * u + 4 * s) >> 4 & two) << (2 * s);
            put_four(at + (4 + u) * 64, word);
        }
}

template <Block B>
void get_codes(const uint8_t* at, uint8_t* codes) {
    if (B == Block::q8_0) {
        for (int s = 0; s < 8; s++) put_four(codes + 4 * s, four(at + s * 64));
        return;
    }
    const uint32_t low = 0x0f0f0f0fu, two = 0x03030303u;
    for (int s = 0; s < 8; s++) {
        uint32_t word = four(at + s / 2 * 64) >> (s % 2 * 4) & low;
        if (B == Block::q6_k)
            word |= (four(at + (4 + s / 4) * 64) >> (s % 4 * 2) & two) << 4;
        put_four(codes + 4 * s, word);
    }
}

void copy_two(uint8_t* to, const uint8_t* from) { std::memcpy(to, from, 2); }

// A panel's place in a span.
struct Place {
    uint8_t *header, *codes;  // of the first group of 32; the next ones are 4 panels further
    int64_t subs;
};

template <Block B>
Place place_of(uint8_t* stream, int64_t panel, int64_t span, int64_t k) {
    const int64_t subs = (k - span * SPAN < SPAN ? k - span * SPAN : SPAN) / SUB;
    uint8_t* at = stream + STRIP_OUTPUTS * (panel / STRIP_PANELS * row_bytes(B, k) +
                                            row_bytes(B, span * SPAN));
    const int64_t p = panel % STRIP_PANELS, header = header_bytes(B, subs);
    return {at + p * header, at + STRIP_PANELS * header + p * code_bytes(B), subs};
}

template <Block B>
void put_span(const uint8_t* blocks, const Place& place, int64_t lane) {
    constexpr int VALUES = block_values(B);
    Unpacked u;
    for (int64_t sub = 0; sub < place.subs; sub++) {
        const uint8_t* block = blocks + sub * SUB / VALUES * block_bytes(B);
        const bool fresh = sub * SUB % VALUES == 0;
        if (fresh) read_block<B>(block, u);
        put_codes<B>(u.codes + sub * SUB % VALUES,
                     place.codes + sub * STRIP_PANELS * code_bytes(B) + 4 * lane);
        if (VALUES == SUB) copy_two(place.header + sub * 32 + 2 * lane, u.d);
    }
    if (B == Block::q4_k) {
        copy_two(place.header + 2 * lane, u.d);
        copy_two(place.header + 32 + 2 * lane, u.dmin);
        for (int i = 0; i < 12; i++) place.header[64 + i * 16 + lane] = u.scales[i];
    }
    if (B == Block::q6_k) {
        copy_two(place.header + 2 * lane, u.d);
        for (int i = 0; i < 16; i++) place.header[32 + i * 16 + lane] = u.scales[i];
    }
}

// bytes 0 to 11 of Q4_K's scales, each `step` bytes after the other, to scale and minimum j of 8
void six_bits(const uint8_t* bytes, int64_t step, int j, int* scale, int* minimum) {
    const auto at = [&](int i) { return int(bytes[i * step]); };
    if (j < 4) {
        *scale = at(j) & 63, *minimum = at(j + 4) & 63;
    } else {
        *scale = (at(j + 4) & 15) | (at(j - 4) >> 2 & 48);
        *minimum = at(j + 4) >> 4 | (at(j) >> 2 & 48);
    }
}

template <Block B>
void get_span(const Place& place, int64_t lane, float* out) {
    const auto half = [&](int64_t at) {
        uint16_t x;
        std::memcpy(&x, place.header + at + 2 * lane, 2);
        return half_to_float(x);
    };
    uint8_t codes[SUB];
    for (int64_t sub = 0; sub < place.subs; sub++, out += SUB) {
        get_codes<B>(place.codes + sub * STRIP_PANELS * code_bytes(B) + 4 * lane, codes);
        if (B == Block::q4_k) {
            int scale, minimum;
            six_bits(place.header + 64 + lane, 16, int(sub), &scale, &minimum);
            const float d = half(0) * float(scale), low = half(32) * float(minimum);
            for (int i = 0; i < SUB; i++) out[i] = d * float(codes[i]) - low;
        } else {
            for (int i = 0; i < SUB; i++) {
                const int code = int(codes[i]) - block_zero(B);
                const float d =
                    B == Block::q6_k
                        ? half(0) * float(int8_t(
                                        place.header[32 + (2 * sub + i / 16) * 16 + lane]))
                        : half(32 * sub);
                out[i] = d * float(code);
            }
        }
    }
}

struct Output {
    int64_t panel, lane;
};

Output output_of(const BlockStream& w, int64_t row) {
    if (!w.gated) return {row / 16, row % 16};
    const bool second = row >= w.n / 2;
    const int64_t within = second ? row - w.n / 2 : row;
    return {within / 16 * 2 + second, within % 16};
}

template <Block B>
void pack_of(const BlockStream& w, const uint8_t* rows, int64_t stride, int64_t first,
             int64_t count) {
    // sixteen rows at a time, mostly those of a panel, go through a span together
    parallel((count + 15) / 16, 4, count * w.k, [&](int64_t from, int64_t to) {
        for (int64_t begin = from * 16; begin < to * 16 && begin < count; begin += 16)
            for (int64_t span = 0; span * SPAN < w.k; span++)
                for (int64_t row = begin; row < begin + 16 && row < count; row++) {
                    const Output at = output_of(w, first + row);
                    put_span<B>(rows + row * stride + row_bytes(B, span * SPAN),
                                place_of<B>(w.data, at.panel, span, w.k), at.lane);
                }
    });
}

template <Block B>
void unpack_of(const BlockStream& w, const int64_t* ids, int64_t count, float* out) {
    parallel(count, 4, count * w.k * 4, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            const Output at = output_of(w, ids[i]);
            for (int64_t span = 0; span * SPAN < w.k; span++)
                get_span<B>(place_of<B>(w.data, at.panel, span, w.k), at.lane,
                            out + i * w.k + span * SPAN);
        }
    });
}

}  // namespace

void pack_blocks(const BlockStream& w, const uint8_t* rows, int64_t stride, int64_t first,
                 int64_t count) {
    switch (w.kind) {
        case Block::q8_0: return pack_of<Block::q8_0>(w, rows, stride, first, count);
        case Block::q4_0: return pack_of<Block::q4_0>(w, rows, stride, first, count);
        case Block::q4_k: return pack_of<Block::q4_k>(w, rows, stride, first, count);
        case Block::q6_k: return pack_of<Block::q6_k>(w, rows, stride, first, count);
    }
}

void unpack_blocks(const BlockStream& w, const int64_t* ids, int64_t count, float* out) {
    switch (w.kind) {
        case Block::q8_0: return unpack_of<Block::q8_0>(w, ids, count, out);
        case Block::q4_0: return unpack_of<Block::q4_0>(w, ids, count, out);
        case Block::q4_k: return unpack_of<Block::q4_k>(w, ids, count, out);
        case Block::q6_k: return unpack_of<Block::q6_k>(w, ids, count, out);
    }
}

}  // namespace hasten
