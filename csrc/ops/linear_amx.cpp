// int8 weights in AMX tiles: products of 16 rows by 16 outputs by 64 inputs in one instruction, for
// steps of more than a few rows.
//
// Sums are exact 32-bit integers, so the bits are those of `linear_int8` on every other processor;
// quantization, scales, bias and gate are the same code. Only the sums of a strip are made here.
#if defined(__AVX512F__)

#include "int8.h"

namespace hasten {
namespace HASTEN_LEVEL {
namespace {

struct Int8Amx : Int8Stream {
    static int32_t factor(const QuantizedArgs&) { return ByteDotVnni::FACTOR; }
};

constexpr int64_t DEPTH = 64;  // inputs of a tile
constexpr int64_t HELD_STRIDE = STRIP_OUTPUTS * 4;

// Fewer rows are read at the speed of memory without tiles.
constexpr int64_t LEAST_ROWS = 5;

// Palette 1. Tiles 0 to 3 hold sums, 4 and 5 rows of activations, 6 and 7 weights.
struct alignas(64) Palette {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles 0 and 1 (2 and 3) have `upper` (`lower`) rows, as many as tile 4 (5); where `lower` is 0,
// all four hold sums of the upper rows.
void configure(int upper, int lower) {
    Palette p;
    for (int t = 0; t < 8; t++) p.row_bytes[t] = 64;
    const int second = lower ? lower : upper;
    const int rows[8] = {upper, upper, second, second, upper, second, 16, 16};
    for (int t = 0; t < 8; t++) p.rows[t] = uint8_t(rows[t]);
    asm volatile("ldtilecfg %0" : : "m"(p) : "memory");
}

#define HASTEN_TILE_LOAD(tile, from, stride)                                        \
    asm volatile("tileloadd (%0,%1,1), %%tmm" #tile                                 \
                 : : "r"(from), "r"(int64_t(stride)) : "memory")
#define HASTEN_TILE_STORE(tile, to, stride)                                         \
    asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)"                             \
                 : : "r"(to), "r"(int64_t(stride)) : "memory")
// sum += signed activations * unsigned weights
#define HASTEN_TILE_DOT(sum, x, w) \
    asm volatile("tdpbsud %%tmm" #w ", %%tmm" #x ", %%tmm" #sum : : : "memory")

// What the tiles of one block of rows go over.
struct Walk {
    const int8_t* x;  // rows of codes
    int64_t x_stride;
    const uint8_t* w;  // first panel of the pass, at the first input
    int64_t w_stride;  // bytes of four inputs of the strip
    int64_t steps;     // tiles along the inputs
    const uint8_t* ahead;
    int lines;  // cache lines to fetch a step

    void fetch() {
        for (int i = 0; i < lines; i++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    }
};

// up to 16 rows by four panels
template <int PANELS>
void walk_one(Walk t, char* held) {
    HASTEN_TILE_LOAD(0, held, HELD_STRIDE);
    if (PANELS > 1) HASTEN_TILE_LOAD(1, held + 64, HELD_STRIDE);
    if (PANELS > 2) HASTEN_TILE_LOAD(2, held + 128, HELD_STRIDE);
    if (PANELS > 3) HASTEN_TILE_LOAD(3, held + 192, HELD_STRIDE);
    for (int64_t i = 0; i < t.steps; i++) {
        t.fetch();
        HASTEN_TILE_LOAD(4, t.x, t.x_stride);
        HASTEN_TILE_LOAD(6, t.w, t.w_stride);
        HASTEN_TILE_DOT(0, 4, 6);
        if (PANELS > 1) {
            HASTEN_TILE_LOAD(7, t.w + 64, t.w_stride);
            HASTEN_TILE_DOT(1, 4, 7);
        }
        if (PANELS > 2) {
            HASTEN_TILE_LOAD(6, t.w + 128, t.w_stride);
            HASTEN_TILE_DOT(2, 4, 6);
        }
        if (PANELS > 3) {
            HASTEN_TILE_LOAD(7, t.w + 192, t.w_stride);
            HASTEN_TILE_DOT(3, 4, 7);
        }
        t.x += DEPTH;
        t.w += DEPTH / 4 * t.w_stride;
    }
    HASTEN_TILE_STORE(0, held, HELD_STRIDE);
    if (PANELS > 1) HASTEN_TILE_STORE(1, held + 64, HELD_STRIDE);
    if (PANELS > 2) HASTEN_TILE_STORE(2, held + 128, HELD_STRIDE);
    if (PANELS > 3) HASTEN_TILE_STORE(3, held + 192, HELD_STRIDE);
}

// up to 32 rows by two panels
template <int PANELS>
void walk_two(Walk t, char* held) {
    char* lower = held + 16 * HELD_STRIDE;
    const int8_t* lower_x = t.x + 16 * t.x_stride;
    HASTEN_TILE_LOAD(0, held, HELD_STRIDE);
    HASTEN_TILE_LOAD(2, lower, HELD_STRIDE);
    if (PANELS > 1) {
        HASTEN_TILE_LOAD(1, held + 64, HELD_STRIDE);
        HASTEN_TILE_LOAD(3, lower + 64, HELD_STRIDE);
    }
    for (int64_t i = 0; i < t.steps; i++) {
        t.fetch();
        HASTEN_TILE_LOAD(6, t.w, t.w_stride);
        HASTEN_TILE_LOAD(4, t.x, t.x_stride);
        HASTEN_TILE_DOT(0, 4, 6);
        HASTEN_TILE_LOAD(5, lower_x, t.x_stride);
        HASTEN_TILE_DOT(2, 5, 6);
        if (PANELS > 1) {
            HASTEN_TILE_LOAD(7, t.w + 64, t.w_stride);
            HASTEN_TILE_DOT(1, 4, 7);
            HASTEN_TILE_DOT(3, 5, 7);
        }
        t.x += DEPTH, lower_x += DEPTH;
        t.w += DEPTH / 4 * t.w_stride;
    }
    HASTEN_TILE_STORE(0, held, HELD_STRIDE);
    HASTEN_TILE_STORE(2, lower, HELD_STRIDE);
    if (PANELS > 1) {
        HASTEN_TILE_STORE(1, held + 64, HELD_STRIDE);
        HASTEN_TILE_STORE(3, lower + 64, HELD_STRIDE);
    }
}

void walk(const Walk& t, int64_t rows, int64_t panels, char* held) {
    if (rows <= 16) {
        switch (panels) {
            case 1: walk_one<1>(t, held); break;
            case 2: walk_one<2>(t, held); break;
            case 3: walk_one<3>(t, held); break;
            default: walk_one<4>(t, held);
        }
    } else if (panels == 1) {
        walk_two<1>(t, held);
    } else {
        walk_two<2>(t, held);
    }
}

}  // namespace

template <>
void strip_sums<Int8Amx>(const QuantizedArgs& a, const Activations& x, int64_t row, int64_t rows,
                         const uint8_t* strip, int64_t width, char* held) {
    const int64_t inputs = (a.k + 15) / 16 * 16;  // of the strip
    const int64_t rest = inputs % DEPTH, steps = inputs / DEPTH;
    const int64_t line = width * 64;  // bytes of four inputs
    for (int64_t r = 0; r < rows; r++)
        for (int64_t p = 0; p < width; p++)
            store((int32_t*)(held + r * HELD_STRIDE) + p * LANES, splat(x.sums + row + r));

    // inputs behind the last whole tile, with zeros up to one
    alignas(64) uint8_t last_w[STRIP * DEPTH * LANES];
    alignas(64) int8_t last_x[32 * DEPTH];
    if (rest) {
        memcpy(last_w, strip + steps * DEPTH / 4 * line, size_t(rest / 4 * line));
        memset(last_w + rest / 4 * line, 0, size_t((DEPTH - rest) / 4 * line));
    }
    // the next strip is fetched meanwhile, or this one where it goes by only once
    const int64_t lines = inputs / 4 * width;
    const int64_t per_pass = rows <= 16 ? STRIP : 2;
    const int64_t passes = ((rows + 31) / 32) * ((width + per_pass - 1) / per_pass);
    const bool once = rows <= 16;
    int64_t pass = 0;
    for (int64_t begin = 0; begin < rows; begin += 32) {
        const int64_t some = rows - begin < 32 ? rows - begin : 32;
        if (begin == 0 || some < 32)
            configure(int(some < 16 ? some : 16), int(some > 16 ? some - 16 : 0));
        const int8_t* codes = x.codes + (row + begin) * x.stride;
        if (rest)
            for (int64_t r = 0; r < some; r++) {
                memcpy(last_x + r * DEPTH, codes + r * x.stride + steps * DEPTH, size_t(rest));
                memset(last_x + r * DEPTH + rest, 0, size_t(DEPTH - rest));
            }
        for (int64_t p = 0; p < width; p += per_pass, pass++) {
            const int64_t panels = width - p < per_pass ? width - p : per_pass;
            char* to = held + begin * HELD_STRIDE + p * 64;
            Walk t{codes, x.stride, strip + p * 64, line, steps, nullptr, 0};
            t.lines = once ? int(16 * width)
                           : int((lines + passes * steps - 1) / (passes * (steps ? steps : 1)));
            t.ahead = once ? t.w + AHEAD_BYTES
                           : strip + (lines + pass * steps * t.lines) * 64;
            if (steps) walk(t, some, panels, to);
            if (rest) {
                Walk end{last_x, DEPTH, last_w + p * 64, line, 1, nullptr, 0};
                walk(end, some, panels, to);
            }
        }
    }
    asm volatile("tilerelease" : : : "memory");
}

namespace {

bool few(const LinearPart* parts, int64_t count) {
    int64_t most = 0;
    for (int64_t i = 0; i < count; i++) most = parts[i].rows > most ? parts[i].rows : most;
    return most < LEAST_ROWS;
}

}  // namespace

void linear_int8_amx(const QuantizedArgs& a, const LinearPart* parts, int64_t count) {
    if (few(parts, count))
        linear_int8_vnni(a, parts, count);
    else
        linear_quantized<Int8Amx>(a, parts, count);
}

}  // namespace HASTEN_LEVEL
}  // namespace hasten

#endif
