// Sums of products of bytes: I16, sixteen 32-bit sums, one for each output of a panel.
//
// A step multiplies four inputs of sixteen outputs: 64 bytes of weights, unsigned, [16][4], by four
// signed activations that all outputs share. Sums are exact, so they do not depend on the
// instruction set or on any order. What multiplies is a class:
//
// - ByteDot: weights are bytes that hold code + 128, codes in [-128, 127]
// - NibbleDot: weights are bytes below 16, the low or the high halves of 64 bytes
//
// both with Weights (64 bytes, made ready) and Inputs (four activations, made ready). A ByteDot adds
// to an I16 that begins with FACTOR times the sum of all activation codes. A NibbleDot adds to a
// Sum, which has room for 32 inputs: it goes from `begin` to `end`, where it joins an I16. With
// AVX-512 there is a form of each that uses VNNI.
#pragma once

#include "../half.h"
#include "ops.h"

namespace hasten {
namespace HASTEN_LEVEL {

HASTEN_INLINE int32_t four(const int8_t* p) {
    int32_t x;
    memcpy(&x, p, 4);
    return x;
}

#if defined(__AVX512F__)

struct I16 {
    __m512i v;
};
HASTEN_INLINE I16 splat(const int32_t* x) { return {_mm512_set1_epi32(*x)}; }
HASTEN_INLINE I16 load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
HASTEN_INLINE void store(int32_t* p, I16 a) { _mm512_storeu_si512(p, a.v); }
HASTEN_INLINE I16 operator+(I16 a, I16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
HASTEN_INLINE F16 to_float(I16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
// y[j] = *a * bytes[j], |*a| below 2^15
HASTEN_INLINE I16 times_bytes(const int32_t* a, const uint8_t* bytes) {
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)bytes));
    return {_mm512_madd_epi16(wide, _mm512_set1_epi32(*a))};
}
// sixteen float16
HASTEN_INLINE F16 load_half(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
}

HASTEN_INLINE __m512i low_halves(const uint8_t* p) {
    return _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(15));
}
HASTEN_INLINE __m512i high_halves(const uint8_t* p) {
    return _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(p), 4), _mm512_set1_epi8(15));
}

// without VNNI bytes are widened, since products of bytes added in pairs saturate at 16 bits
struct ByteDot {
    struct Weights {
        __m512i even, odd;  // 16-bit numbers: inputs 0 and 2, inputs 1 and 3
    };
    typedef Weights Inputs;
    static constexpr int MOST_ROWS = 4, MOST_PANELS = 4;
    static constexpr int panels_of(int) { return 4; }
    static constexpr int32_t FACTOR = -128;

    static HASTEN_INLINE Weights weights(const uint8_t* p) {
        const __m512i w = _mm512_loadu_si512(p);
        return {_mm512_and_si512(w, _mm512_set1_epi16(255)), _mm512_srli_epi16(w, 8)};
    }
    static HASTEN_INLINE Inputs inputs(const int8_t* p) {
        const __m512i x = _mm512_set1_epi32(four(p));
        return {_mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8), _mm512_srai_epi16(x, 8)};
    }
    static HASTEN_INLINE void add(I16& sum, Weights w, Inputs x) {
        sum = sum + I16{_mm512_madd_epi16(w.even, x.even)} + I16{_mm512_madd_epi16(w.odd, x.odd)};
    }
};

// products of a nibble fit 16 bits even when those of 32 inputs are added: 8 * 2 * 15 * 127
struct NibbleDot {
    typedef __m512i Weights, Inputs;
    struct Sum {
        __m512i v;  // 16-bit numbers
    };
    static constexpr int MOST_ROWS = 6, MOST_PANELS = 4;
    static constexpr int panels_of(int) { return 4; }

    static HASTEN_INLINE Sum begin(I16) { return {_mm512_setzero_si512()}; }
    static HASTEN_INLINE Weights low(const uint8_t* p) { return low_halves(p); }
    static HASTEN_INLINE Weights high(const uint8_t* p) { return high_halves(p); }
    static HASTEN_INLINE Inputs inputs(const int8_t* p) { return _mm512_set1_epi32(four(p)); }
    static HASTEN_INLINE void add(Sum& sum, Weights w, Inputs x) {
        sum.v = _mm512_add_epi16(sum.v, _mm512_maddubs_epi16(w, x));
    }
    static HASTEN_INLINE void end(I16& total, Sum sum) {
        total = total + I16{_mm512_madd_epi16(sum.v, _mm512_set1_epi16(1))};
    }
};

// written as assembly, since GCC 12 copies the sum of its intrinsic around
HASTEN_INLINE void dot_vnni(I16& sum, __m512i w, __m512i x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(w), "v"(x));
}

struct ByteDotVnni {
    typedef __m512i Weights, Inputs;
    static constexpr int MOST_ROWS = 6, MOST_PANELS = 4;
    static constexpr int panels_of(int) { return 4; }
    static constexpr int32_t FACTOR = -128;

    static HASTEN_INLINE Weights weights(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static HASTEN_INLINE Inputs inputs(const int8_t* p) { return _mm512_set1_epi32(four(p)); }
    static HASTEN_INLINE void add(I16& sum, Weights w, Inputs x) { dot_vnni(sum, w, x); }
};

struct NibbleDotVnni {
    typedef __m512i Weights, Inputs;
    typedef I16 Sum;
    static constexpr int MOST_ROWS = 6, MOST_PANELS = 4;
    // whole strips while memory decides, then as many as leave registers for sums and outputs
    static constexpr int panels_of(int rows) { return rows <= 5 ? 4 : 2; }

    static HASTEN_INLINE Sum begin(I16 total) { return total; }
    static HASTEN_INLINE Weights low(const uint8_t* p) { return low_halves(p); }
    static HASTEN_INLINE Weights high(const uint8_t* p) { return high_halves(p); }
    static HASTEN_INLINE Inputs inputs(const int8_t* p) { return _mm512_set1_epi32(four(p)); }
    static HASTEN_INLINE void add(Sum& sum, Weights w, Inputs x) { dot_vnni(sum, w, x); }
    static HASTEN_INLINE void end(I16& total, Sum sum) { total = sum; }
};

#elif defined(__AVX2__)

struct I16 {
    __m256i lo, hi;
};
HASTEN_INLINE I16 splat(const int32_t* x) { return {_mm256_set1_epi32(*x), _mm256_set1_epi32(*x)}; }
HASTEN_INLINE __m256i load32(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
HASTEN_INLINE I16 load(const int32_t* p) { return {load32(p), load32(p + 8)}; }
HASTEN_INLINE void store(int32_t* p, I16 a) {
    _mm256_storeu_si256((__m256i*)p, a.lo);
    _mm256_storeu_si256((__m256i*)(p + 8), a.hi);
}
HASTEN_INLINE I16 operator+(I16 a, I16 b) {
    return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
HASTEN_INLINE F16 to_float(I16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
HASTEN_INLINE I16 times_bytes(const int32_t* a, const uint8_t* bytes) {
    const __m256i factor = _mm256_set1_epi32(*a);
    const __m256i lo = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)bytes));
    const __m256i hi = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(bytes + 8)));
    return {_mm256_madd_epi16(lo, factor), _mm256_madd_epi16(hi, factor)};
}
HASTEN_INLINE F16 load_half(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}

// vpmaddubsw adds products in pairs and saturates at 16 bits. |code| times an activation that has
// taken the code's sign is at most 128 * 127, and twice that still fits.
struct ByteDot {
    struct Weights {
        __m256i lo, hi, lo_size, hi_size;
    };
    typedef __m256i Inputs;
    static constexpr int MOST_ROWS = 4, MOST_PANELS = 4;
    static constexpr int panels_of(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
    static constexpr int32_t FACTOR = 0;

    static HASTEN_INLINE Weights weights(const uint8_t* p) {
        const __m256i flip = _mm256_set1_epi8(-128);
        const __m256i lo = _mm256_xor_si256(load32(p), flip);
        const __m256i hi = _mm256_xor_si256(load32(p + 32), flip);
        return {lo, hi, _mm256_abs_epi8(lo), _mm256_abs_epi8(hi)};
    }
    static HASTEN_INLINE Inputs inputs(const int8_t* p) { return _mm256_set1_epi32(four(p)); }
    static HASTEN_INLINE void add(I16& sum, Weights w, Inputs x) {
        const __m256i one = _mm256_set1_epi16(1);
        const __m256i lo = _mm256_maddubs_epi16(w.lo_size, _mm256_sign_epi8(x, w.lo));
        const __m256i hi = _mm256_maddubs_epi16(w.hi_size, _mm256_sign_epi8(x, w.hi));
        sum = sum + I16{_mm256_madd_epi16(lo, one), _mm256_madd_epi16(hi, one)};
    }
};

// products of a nibble fit 16 bits even when those of 32 inputs are added: 8 * 2 * 15 * 127
struct NibbleDot {
    struct Weights {
        __m256i lo, hi;
    };
    typedef __m256i Inputs;
    typedef Weights Sum;  // 16-bit numbers
    static constexpr int MOST_ROWS = 4, MOST_PANELS = 2;
    static constexpr int panels_of(int rows) { return rows <= 2 ? 2 : 1; }

    static HASTEN_INLINE Sum begin(I16) {
        return {_mm256_setzero_si256(), _mm256_setzero_si256()};
    }
    static HASTEN_INLINE Weights low(const uint8_t* p) {
        const __m256i half = _mm256_set1_epi8(15);
        return {_mm256_and_si256(load32(p), half), _mm256_and_si256(load32(p + 32), half)};
    }
    static HASTEN_INLINE Weights high(const uint8_t* p) {
        const __m256i half = _mm256_set1_epi8(15);
        return {_mm256_and_si256(_mm256_srli_epi16(load32(p), 4), half),
                _mm256_and_si256(_mm256_srli_epi16(load32(p + 32), 4), half)};
    }
    static HASTEN_INLINE Inputs inputs(const int8_t* p) { return _mm256_set1_epi32(four(p)); }
    static HASTEN_INLINE void add(Sum& sum, Weights w, Inputs x) {
        sum.lo = _mm256_add_epi16(sum.lo, _mm256_maddubs_epi16(w.lo, x));
        sum.hi = _mm256_add_epi16(sum.hi, _mm256_maddubs_epi16(w.hi, x));
    }
    static HASTEN_INLINE void end(I16& total, Sum sum) {
        const __m256i one = _mm256_set1_epi16(1);
        total = total + I16{_mm256_madd_epi16(sum.lo, one), _mm256_madd_epi16(sum.hi, one)};
    }
};

#else

struct I16 {
    int32_t v[LANES];
};
HASTEN_INLINE I16 splat(const int32_t* x) {
    I16 r;
    for (int i = 0; i < LANES; i++) r.v[i] = *x;
    return r;
}
HASTEN_INLINE I16 load(const int32_t* p) {
    I16 r;
    memcpy(r.v, p, sizeof r.v);
    return r;
}
HASTEN_INLINE void store(int32_t* p, I16 a) { memcpy(p, a.v, sizeof a.v); }
HASTEN_INLINE I16 operator+(I16 a, I16 b) {
    for (int i = 0; i < LANES; i++) a.v[i] += b.v[i];
    return a;
}
HASTEN_INLINE F16 to_float(I16 a) {
    F16 r;
    for (int i = 0; i < LANES; i++) r.v[i] = float(a.v[i]);
    return r;
}
HASTEN_INLINE I16 times_bytes(const int32_t* a, const uint8_t* bytes) {
    I16 r;
    for (int i = 0; i < LANES; i++) r.v[i] = *a * bytes[i];
    return r;
}
HASTEN_INLINE F16 load_half(const uint16_t* p) {
    F16 r;
    for (int i = 0; i < LANES; i++) r.v[i] = half_to_float(p[i]);
    return r;
}

struct ByteDot {
    typedef const uint8_t* Weights;
    typedef const int8_t* Inputs;
    static constexpr int MOST_ROWS = 2, MOST_PANELS = 1;
    static constexpr int panels_of(int) { return 1; }
    static constexpr int32_t FACTOR = 0;

    static HASTEN_INLINE Weights weights(const uint8_t* p) { return p; }
    static HASTEN_INLINE Inputs inputs(const int8_t* p) { return p; }
    static HASTEN_INLINE void add(I16& sum, Weights w, Inputs x) {
        for (int j = 0; j < LANES; j++)
            for (int i = 0; i < 4; i++) sum.v[j] += (int(w[4 * j + i]) - 128) * x[i];
    }
};

struct NibbleDot {
    struct Weights {
        const uint8_t* p;
        int shift;
    };
    typedef const int8_t* Inputs;
    typedef I16 Sum;
    static constexpr int MOST_ROWS = 2, MOST_PANELS = 1;
    static constexpr int panels_of(int) { return 1; }

    static HASTEN_INLINE Sum begin(I16 total) { return total; }
    static HASTEN_INLINE Weights low(const uint8_t* p) { return {p, 0}; }
    static HASTEN_INLINE Weights high(const uint8_t* p) { return {p, 4}; }
    static HASTEN_INLINE Inputs inputs(const int8_t* p) { return p; }
    static HASTEN_INLINE void add(Sum& sum, Weights w, Inputs x) {
        for (int j = 0; j < LANES; j++)
            for (int i = 0; i < 4; i++) sum.v[j] += int(w.p[4 * j + i] >> w.shift & 15) * x[i];
    }
    static HASTEN_INLINE void end(I16& total, Sum sum) { total = sum; }
};

#endif

}  // namespace HASTEN_LEVEL
}  // namespace hasten
