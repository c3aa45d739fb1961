// Linear layers on integer weights: what the formats share.
//
// A weight is a stream of strips, each of up to STRIP panels of 16 outputs. A strip has *units* of
// inputs one after the other, a unit all its panels, and may end with a tail. Activations become
// codes (quantize.h); a tile of rows and panels goes over units and adds to what it holds for each
// output, which is exact or in one fixed order, so nothing below can change a bit: who computes a
// strip, how rows are cut into tiles, and where units are cut into pieces.
//
// A format F has
//     typename Dot                            what multiplies (dot.h)
//     int64_t unit(a), block(a)               inputs of a unit; inputs that share an activation
//                                             scale, a divisor of k
//     int32_t factor(a)                       of the sums of activation codes
//     int64_t unit_bytes(a), tail_bytes(a)    of one panel
//     void tile<R, P>(const Tile&)            R rows, P panels
//     F16 result(...)                         an output from what a tile left behind
#pragma once

#include <atomic>
#include <vector>

#include "dot.h"
#include "gate.h"
#include "quantize.h"

namespace hasten {
namespace HASTEN_LEVEL {

constexpr int STRIP = 4;
constexpr int64_t STRIP_OUTPUTS = STRIP * LANES;
// Rows whose sums are held while a strip goes by.
constexpr int64_t PASS = 128;
// A strip is read in pieces that stay in the first-level cache while every tile goes over them
// and the next piece arrives from memory, each tile fetching its share.
constexpr int64_t PIECE_BYTES = 32 << 10;
// How far ahead of a tile weights are fetched when nobody has fetched them yet: so far that memory
// has answered, and past what the processor fetches by itself.
constexpr int64_t AHEAD_BYTES = 8 << 10;
// So many rows are quantized by every thread for itself, which takes less than waiting for others.
constexpr int64_t FEW_ROWS = 8;

struct Tile {
    const QuantizedArgs* args;
    const Activations* x;
    int64_t row;          // the first one
    int64_t unit, units;  // the first one and how many
    const uint8_t* w;     // the strip at the first unit
    int64_t width;        // panels in the strip
    int64_t panel;        // the first one of the tile
    char* held;           // [rows][STRIP_OUTPUTS] of 4 bytes, at the first row and panel
    bool first;           // start from nothing, not from what is held
    const uint8_t* ahead;  // what to fetch meanwhile, `lines` cache lines a unit
    int lines;

    HASTEN_INLINE const uint8_t* fetch(const uint8_t* at) const {
        for (int i = 0; i < lines; i++, at += 64) __builtin_prefetch(at, 0, 2);
        return at;
    }
};

typedef void (*TileFunction)(const Tile&);

// at[rows][panels], filled for rows <= MOST_ROWS and panels <= panels_of(rows)
template <class F>
struct TileTable {
    typedef typename F::Dot Dot;
    TileFunction at[Dot::MOST_ROWS + 1][Dot::MOST_PANELS + 1] = {};

    constexpr TileTable() { fill<1, 1>(); }

    template <int R, int P>
    constexpr void fill() {
        at[R][P] = F::template tile<R, P>;
        if constexpr (P < Dot::panels_of(R))
            fill<R, P + 1>();
        else if constexpr (R < Dot::MOST_ROWS)
            fill<R + 1, 1>();
    }
};

template <class F>
constexpr TileTable<F> TILES;

// Rows [row, row + rows) by a strip: what a tile leaves behind for each output.
template <class F>
void strip_sums(const QuantizedArgs& a, const Activations& x, int64_t row, int64_t rows,
                const uint8_t* strip, int64_t width, char* held) {
    typedef typename F::Dot Dot;
    const int64_t units = (a.k + F::unit(a) - 1) / F::unit(a);
    const int64_t unit_bytes = F::unit_bytes(a) * width;
    const int64_t pieces = (units * unit_bytes + PIECE_BYTES - 1) / PIECE_BYTES;
    const int64_t tiles = (rows + Dot::MOST_ROWS - 1) / Dot::MOST_ROWS;
    const int64_t unit_lines = (unit_bytes + 63) / 64;
    // tiles of nearly equal size
    const auto rows_before = [=](int64_t tile) { return rows * tile / tiles; };
    int64_t passes = 0;  // over a piece
    for (int64_t i = 0; i < tiles; i++) {
        const int step = Dot::panels_of(int(rows_before(i + 1) - rows_before(i)));
        passes += (width + step - 1) / step;
    }
    const int64_t share = (unit_lines + passes - 1) / passes;  // of the next piece, for each pass
    Tile t;
    t.args = &a, t.x = &x, t.width = width;
    for (int64_t piece = 0; piece < pieces; piece++) {
        t.unit = units * piece / pieces;
        t.units = units * (piece + 1) / pieces - t.unit;
        t.first = piece == 0;
        t.w = strip + t.unit * unit_bytes;
        const uint8_t* next = t.w + t.units * unit_bytes;
        int64_t pass = 0;
        for (int64_t i = 0; i < tiles; i++) {
            const int64_t begin = rows_before(i);
            const int count = int(rows_before(i + 1) - begin);
            const int step = Dot::panels_of(count);
            t.row = row + begin;
            for (int64_t p = 0; p < width; p += step, pass++) {
                if (passes == 1 || (piece == 0 && pass == 0)) {
                    t.lines = int(unit_lines);
                    t.ahead = t.w + AHEAD_BYTES;
                } else {
                    t.lines = pass * share < unit_lines ? int(share) : 0;
                    t.ahead = next + pass * share * t.units * 64;
                }
                t.panel = p;
                t.held = held + (begin * STRIP_OUTPUTS + p * LANES) * 4;
                TILES<F>.at[count][width - p < step ? width - p : step](t);
            }
        }
    }
}

// Rows [row, row + rows) of a part, whose sums are held, by the strip that begins with `panel`.
template <class F>
void finish(const QuantizedArgs& a, const LinearPart& part, int64_t row, int64_t rows,
            const float* x_scale, int64_t x_blocks, int64_t panel, int64_t width,
            const uint8_t* tail, const char* held) {
    for (int64_t r = 0; r < rows; r++, held += STRIP_OUTPUTS * 4, x_scale += x_blocks) {
        float* out = part.out + (row + r) * a.out_stride;
        const float* add = part.add ? part.add + (row + r) * a.add_stride : nullptr;
        const auto sum = [&](int64_t p) {
            return F::result(held + p * LANES * 4, tail + p * F::tail_bytes(a), *x_scale);
        };
        if (a.gate == Gate::none) {
            for (int64_t p = 0; p < width; p++) {
                const int64_t column = (panel + p) * LANES;
                const int n = a.n - column < LANES ? int(a.n - column) : LANES;
                F16 y = sum(p);
                if (part.bias) y = y + load_first(part.bias + column, n);
                if (add) y = y + load_first(add + column, n);
                store_first(out + column, y, n);
            }
        } else {
            for (int64_t p = 0; p < width; p += 2) {
                const int64_t half = a.n / 2, column = (panel + p) / 2 * LANES;
                const int n = half - column < LANES ? int(half - column) : LANES;
                F16 gate = sum(p), up = sum(p + 1);
                if (part.bias) {
                    gate = gate + load_first(part.bias + column, n);
                    up = up + load_first(part.bias + half + column, n);
                }
                store_first(out + column, gated(a.gate, gate, up), n);
            }
        }
    }
}

template <class F>
void linear_quantized(const QuantizedArgs& a, const LinearPart* parts, int64_t count) {
    const int64_t half = (a.n / 2 + LANES - 1) / LANES;
    const int64_t panels = a.gate == Gate::none ? (a.n + LANES - 1) / LANES : 2 * half;
    const int64_t strips = (panels + STRIP - 1) / STRIP;
    const int64_t block = F::block(a);
    const int32_t factor = F::factor(a);
    const int64_t units = (a.k + F::unit(a) - 1) / F::unit(a);
    const int64_t panel_bytes = units * F::unit_bytes(a) + F::tail_bytes(a);
    std::vector<int64_t> first(size_t(count) + 1);  // rows before each part
    for (int64_t i = 0; i < count; i++) first[i + 1] = first[i] + parts[i].rows;
    const int64_t rows = first[count];
    if (rows == 0 || strips == 0) return;

    const auto quantize_rows = [&](const Activations& x, int64_t begin, int64_t end) {
        for (int64_t i = 0, row = begin; row < end; row++) {
            while (row >= first[i + 1]) i++;
            quantize_row(parts[i].x + (row - first[i]) * a.x_stride, a.k, block, factor, x, row);
        }
    };
    const size_t bytes = Activations::bytes(rows, a.k, block);
    const bool by_each = rows <= FEW_ROWS;
    void* shared = nullptr;
    if (!by_each) {
        shared = scratch(bytes);
        const Activations x(shared, rows, a.k, block);
        parallel(rows, 4, rows * a.k, [&](int64_t begin, int64_t end) {
            quantize_rows(x, begin, end);
        });
    }
    static std::atomic<uint64_t> calls{0};
    const uint64_t call = ++calls;

    // a range of at least 16 KiB of weights, so that threads rarely meet at a counter
    const int64_t grain = 1 + (16 << 10) / (STRIP * panel_bytes);
    parallel(count * strips, grain, rows * a.k * a.n, [&](int64_t begin, int64_t end) {
        const Activations x(by_each ? scratch(bytes) : shared, rows, a.k, block);
        if (by_each) {
            thread_local uint64_t quantized = 0;  // the call whose rows are in this memory
            if (quantized != call) quantize_rows(x, 0, rows);
            quantized = call;
        }
        alignas(64) char held[PASS * STRIP_OUTPUTS * 4];
        for (int64_t item = begin; item < end; item++) {
            const LinearPart& part = parts[item / strips];
            const int64_t panel = item % strips * STRIP;
            const int64_t width = panels - panel < STRIP ? panels - panel : STRIP;
            const uint8_t* strip = (const uint8_t*)part.w + panel * panel_bytes;
            for (int64_t row = 0; row < part.rows; row += PASS) {
                const int64_t some = part.rows - row < PASS ? part.rows - row : PASS;
                const int64_t at = first[item / strips] + row;
                // outputs are written line by line, far apart: they come while sums are made
                const int64_t column = (a.gate == Gate::none ? panel : panel / 2) * LANES;
                const int64_t columns = (a.gate == Gate::none ? width : width / 2) * LANES;
                for (int64_t r = row; r < row + some; r++)
                    for (int64_t i = 0; i < columns; i += LANES)
                        __builtin_prefetch(part.out + r * a.out_stride + column + i, 1, 3);
                strip_sums<F>(a, x, at, some, strip, width, held);
                finish<F>(a, part, row, some, x.scales + at * x.blocks, x.blocks, panel, width,
                          strip + units * F::unit_bytes(a) * width, held);
            }
        }
    });
}

}  // namespace HASTEN_LEVEL
}  // namespace hasten
