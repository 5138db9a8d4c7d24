#pragma once

// A layer's keys and values as `kernels/pages.py` lays them out: floats, or codes of 8 or 4 bits with scales, which are rounded
// when a token is stored and made floats again, a part of a text at a time, when it is looked at.
//
// Legend: a slot is a token's place; own: each token and head has its scale; else each head and channel has a constant one.

#include "linear.h"

#include <cmath>

extern "C" {

struct Half {  // the keys, or the values
    void* codes;  // [slots][keys][width], fp32, bf16, a byte each, or half of one: the lower half is the even channel
    void *scale, *zero;  // own: bf16 and, where it is not always the middle, uint8, [slots][keys]; else float [keys][width]
    // Of a balanced cache, whose coordinates are (x - center) into; else null. back: what queries are multiplied with, so that
    // they meet such keys, or what is seen of values, which lacks but the center then. [keys][width][width], [keys][width]
    const float *into, *back, *center;
};

struct Pages {
    Half half[2];  // k, v
    int32_t kind, own;  // see Kept
    int32_t sinks, layer;  // tokens at the start of a text that are kept in floats too; which layer this is
};
}

namespace {

enum Kept { FP32, BF16, FP8, INT8, INT4 };
typedef uint8_t EightBytes __attribute__((vector_size(8)));

constexpr float LEVELS[] = {0, 0, 0, 255, 15}, MIDDLE[] = {0, 0, 0, 128, 8};

inline Floats clamp(Floats x, Floats low, Floats high) {  // what is no number stays none
    x = x < low ? low : x;
    return x > high ? high : x;
}

inline Ints whole(Floats x) { return (Ints)(x + 0x1.8p23f) - 0x4b400000; }  // the nearest; below 2^22

inline EightHalves to_bf16(Floats x) {
    const Ints bits = (Ints)x, code = ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) & 0xffff;
    return __builtin_convertvector(x == x ? code : code * 0 + 0x7fc0, EightHalves);
}
inline uint16_t to_bf16(float x) { return to_bf16(Floats{} + x)[0]; }
inline float from_bf16(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    return load<float>(&bits);
}

// E4M3: a float's exponent less 120, and the three first bits of its fraction; below 2^-6 a multiple of 2^-9

inline Ints to_fp8(Floats x) {
    x = clamp(x, Floats{} - 448, Floats{} + 448);
    const Ints sign = (Ints)x >> 24 & 0x80, bits = (Ints)x & 0x7fffffff;
    const Ints large = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - 960;
    const Ints small = whole((Floats)bits * 512);
    const Ints code = (Floats)bits < 0x1p-6f ? small : large;
    return sign | (bits > 0x7f800000 ? code * 0 + 0x7f : code);
}
inline Floats from_fp8(Ints code) {
    const Ints size = code & 0x7f;
    const Floats large = (Floats)((size + 960) << 20), small = floats(size) * 0x1p-9f;
    const Floats value = size < 8 ? small : size == 0x7f ? Floats{} + NAN : large;
    return (Floats)((Ints)value | (code & 0x80) << 24);
}

template <int KIND> inline Floats eight_of(const uint8_t* codes, int d) {
    if constexpr (KIND == INT4) {
        const Ints all = Ints{} + load<int32_t>(codes + d / 2);
        return floats(all >> Ints{0, 4, 8, 12, 16, 20, 24, 28} & 15);
    }
#ifdef __AVX2__
    const Ints code = (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(codes + d)));
#else
    const Ints code = __builtin_convertvector(load<EightBytes>(codes + d), Ints);
#endif
    return KIND == FP8 ? from_fp8(code) : floats(code);
}

// One token and head. row: slot * keys + head

template <int KIND> void widen_row(const Half& half, bool own, size_t row, int head, int width, float* x) {
    const uint8_t* codes = (const uint8_t*)half.codes + row * width / (KIND == INT4 ? 2 : 1);
    if (own) {
        const Floats scale = Floats{} + from_bf16(((const uint16_t*)half.scale)[row]);
        const Floats zero = Floats{} + (half.zero ? float(((const uint8_t*)half.zero)[row]) : MIDDLE[KIND]);
        for (int d = 0; d < width; d += 8) store(x + d, (eight_of<KIND>(codes, d) - zero) * scale);
    } else {
        const float *scale = (const float*)half.scale + head * width, *zero = (const float*)half.zero + head * width;
        for (int d = 0; d < width; d += 8)
            store(x + d, (eight_of<KIND>(codes, d) - load<Floats>(zero + d)) * load<Floats>(scale + d));
    }
}

// y = x M, of a square matrix
inline void times(const float* x, const float* matrix, int width, float* y) {
    for (int d = 0; d < width; d += 8) {
        Floats total = {};
        for (int e = 0; e < width; ++e) total += x[e] * load<Floats>(matrix + size_t(e) * width + d);
        store(y + d, total);
    }
}

typedef void (*WidenRow)(const Half&, bool, size_t, int, int, float*);
constexpr WidenRow WIDEN_ROW[] = {nullptr, nullptr, widen_row<FP8>, widen_row<INT8>, widen_row<INT4>};

// The scale and zero point that `infopt.kv_cache.CacheGrid.range` takes from a token, stored
void range_of(const Half& half, int kind, size_t row, const float* x, int width) {
    Floats low = {}, high = {}, odd = {};
    for (int d = 0; d < width; d += 8) {
        const Floats x_d = load<Floats>(x + d);
        low = x_d < low ? x_d : low, high = x_d > high ? x_d : high, odd += x_d * 0;
    }
    float least = 0, most = 0;
    for (int i = 0; i < 8; ++i) least = low[i] < least ? low[i] : least, most = high[i] > most ? high[i] : most;
    const float largest = -least > most ? -least : most;
    float scale = kind == FP8 ? largest / 448 : half.zero ? (most - least) / LEVELS[kind] : 2 * largest / LEVELS[kind];
    scale = (scale < 0x1p-40f ? 0x1p-40f : scale) + sum(odd);
    ((uint16_t*)half.scale)[row] = to_bf16(scale);
    if (!half.zero) return;
    const float zero = std::nearbyint(-least / from_bf16(to_bf16(scale)));
    ((uint8_t*)half.zero)[row] = uint8_t(zero < LEVELS[kind] ? zero : LEVELS[kind]);
}

void keep_row(const Pages& pages, const Half& half, size_t row, int head, int width, const float* x) {
    if (pages.kind == FP32 || pages.kind == BF16) {
        for (int d = 0; d < width; d += 8)
            if (pages.kind == FP32) store((float*)half.codes + row * width + d, load<Floats>(x + d));
            else store((uint16_t*)half.codes + row * width + d, to_bf16(load<Floats>(x + d)));
        return;
    }
    Floats scale = {}, zero = {};
    if (pages.own) {
        range_of(half, pages.kind, row, x, width);
        scale += from_bf16(((const uint16_t*)half.scale)[row]);
        zero += half.zero ? float(((const uint8_t*)half.zero)[row]) : MIDDLE[pages.kind];
    }
    uint8_t* const codes = (uint8_t*)half.codes + (pages.kind == INT4 ? row * width / 2 : row * width);
    for (int d = 0; d < width; d += 8) {
        if (!pages.own) {
            scale = load<Floats>((const float*)half.scale + head * width + d);
            zero = load<Floats>((const float*)half.zero + head * width + d);
        }
        const Floats value = load<Floats>(x + d) / scale;
        const Floats inside = clamp(value, -zero, LEVELS[pages.kind] - zero);
        const Ints code = pages.kind == FP8 ? to_fp8(value) : whole(inside) + whole(zero);
        if (pages.kind == INT4) {
            for (int i = 0; i < 8; i += 2) codes[(d + i) / 2] = uint8_t((code[i] & 15) | (code[i + 1] & 15) << 4);
        } else {
            store(codes + d, __builtin_convertvector(code, EightBytes));
        }
    }
}

}  // namespace
