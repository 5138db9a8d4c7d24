#pragma once

// Attention of one new token over its text's pages.
//
// A text is cut into parts of 64 positions, each with its own maximum, which are put together at the end. Which parts there are
// depends on the token's position alone, and so does the order of every sum: the bits do not depend on what else is computed.

#include "pages.h"

#include <algorithm>
#include <type_traits>

extern "C" {

struct Heads {  // of a block
    float scaling;
    int32_t queries, keys, width;  // heads, and channels of one
};

struct Text {  // one new token: where its text's keys and values are, for the layers of one kind
    const int64_t* table;  // pages, used as a ring
    float* sinks;  // its first tokens' keys and values in all layers, not rounded, [layers][2][sinks][keys][width]
    int64_t pages, first, position;  // the first token that it sees, and its own place
};
}

namespace {

constexpr int PART = 64, PAGE = 16;

// Where a token of this text is
inline int64_t slot_of(const Text& text, int64_t position) {
    return text.table[position / PAGE % text.pages] * PAGE + position % PAGE;
}

inline float* sink_of(const Text& text, const Pages& pages, const Heads& heads, int which, int64_t position, int head) {
    const size_t token = (size_t(pages.layer) * 2 + which) * pages.sinks + position;
    return text.sinks + (token * heads.keys + head) * heads.width;
}

int parts_of(const Text& text) { return int(text.position / PART - text.first / PART) + 1; }

inline Floats exp8(Floats x) {  // 2^n * e^r with |r| <= ln 2 / 2, a polynomial; relative error below 3e-7
    x = x < -87.0f ? Floats{} - 87.0f : x;
    x = x > 88.0f ? Floats{} + 88.0f : x;
    const Floats moved = x * 1.44269504f + 0x1.8p23f, n = moved - 0x1.8p23f;
    const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats p = r * (1.0f / 720) + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    return p * (Floats)(((Ints)moved - 0x4b400000 + 127) << 23);
}

// The sums of eight vectors, in one
inline Floats sums(const Floats* x) {
#ifdef __AVX2__
    const __m256 a = _mm256_hadd_ps((__m256)x[0], (__m256)x[1]), b = _mm256_hadd_ps((__m256)x[2], (__m256)x[3]);
    const __m256 c = _mm256_hadd_ps((__m256)x[4], (__m256)x[5]), d = _mm256_hadd_ps((__m256)x[6], (__m256)x[7]);
    const __m256 low = _mm256_hadd_ps(a, b), high = _mm256_hadd_ps(c, d);
    return (Floats)_mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
#else
    return Floats{sum(x[0]), sum(x[1]), sum(x[2]), sum(x[3]), sum(x[4]), sum(x[5]), sum(x[6]), sum(x[7])};
#endif
}

inline float most_of(Floats x) {
    float most = x[0];
    for (int i = 1; i < 8; ++i) most = x[i] > most ? x[i] : most;
    return most;
}

// What one thread needs beside: the scores of its queries, and what it has made floats of codes, which is some heads of a part
// of one text, from the first position that was asked for to `end`.
struct Desk {
    float *scores, *wide[2];  // [queries][PART]; [PART][keys][width] of keys and of values
    const int64_t* table = nullptr;
    int64_t part = 0, end = 0;
    int head = 0;
};

struct Some {  // heads of keys, and a part of a text
    int first, last;
    int64_t part;
    bool once;  // only one token looks at it, so that it comes from far
};

// Where these keys and values are, in fp32 or bf16 [eights][8][keys][width]. Eight positions lie in one page
struct Rows {
    const void* eights[2][PART / 8];

    Rows(const Heads& heads, const Text& text, const Pages& pages, const Some& some, int64_t low, int64_t high, Desk& desk) {
        const bool plain = pages.kind == FP32 || pages.kind == BF16;
        const size_t size = size_t(heads.keys) * heads.width, bytes = size * (pages.kind == FP32 ? 4 : 2);
        if (text.table != desk.table || some.part != desk.part || some.first != desk.head)
            desk.table = text.table, desk.part = some.part, desk.head = some.first, desk.end = low;
        for (int64_t position = low; position <= high; position += 8) {
            const int64_t slot = slot_of(text, position);
            for (int which = 0; which < 2; ++which) {
                const Half& half = pages.half[which];
                float* x = desk.wide[which] + position % PART * size;
                eights[which][(position - low) / 8] = plain ? (const char*)half.codes + slot * bytes : (const char*)x;
                for (int j = 0; !plain && position >= desk.end && j < 8; ++j)
                    for (int h = some.first; h < some.last; ++h) {
                        float* const to = x + j * size + h * heads.width;
                        if (position + j < pages.sinks)
                            std::copy_n(sink_of(text, pages, heads, which, position + j, h), heads.width, to);
                        else WIDEN_ROW[pages.kind](half, pages.own, (slot + j) * heads.keys + h, h, heads.width, to);
                    }
            }
        }
        desk.end = high / 8 * 8 + 8 > desk.end ? high / 8 * 8 + 8 : desk.end;
    }
};

// As many channels at once as a register holds; eight where a head is no multiple of that
#if defined(__AVX512F__) && defined(__AVX512DQ__)
typedef float Lanes __attribute__((vector_size(64)));
inline Lanes widen(const uint16_t* x, Lanes) {
    return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(x)), 16);
}
inline Floats folded(Lanes x) {
    return (Floats)_mm512_castps512_ps256((__m512)x) + (Floats)_mm512_extractf32x8_ps((__m512)x, 1);
}
#else
typedef Floats Lanes;
#endif
inline Floats widen(const uint16_t* x, Floats) { return Bf16::widen(x); }
inline Floats folded(Floats x) { return x; }
template <class Vector> inline Vector some_of(const float* x) { return load<Vector>(x); }
template <class Vector> inline Vector some_of(const uint16_t* x) { return widen(x, Vector{}); }
template <class Vector> constexpr int WIDTH = sizeof(Vector) / sizeof(float);

// The products of G queries, which share what is read, with eight keys, into scores [G][PART]
template <int G, class Vector, class Value>
void score(const Value* k, size_t stride, int width, const float* q, float scaling, float* p) {
    constexpr int ROWS_AT_ONCE = G > 2 && WIDTH<Vector> == 8 ? 4 : 8;  // there are twice as many registers of 16
    Floats products[G][8];
    for (int first = 0; first < 8; first += ROWS_AT_ONCE, k += ROWS_AT_ONCE * stride) {
        Vector some[G][ROWS_AT_ONCE] = {};
        for (int d = 0; d < width; d += WIDTH<Vector>)
            UNROLLED for (int j = 0; j < ROWS_AT_ONCE; ++j) {
                const Vector k_d = some_of<Vector>(k + j * stride + d);
                UNROLLED for (int g = 0; g < G; ++g) some[g][j] += load<Vector>(q + g * width + d) * k_d;
            }
        UNROLLED for (int g = 0; g < G; ++g)
            UNROLLED for (int j = 0; j < ROWS_AT_ONCE; ++j) products[g][first + j] = folded(some[g][j]);
    }
    UNROLLED for (int g = 0; g < G; ++g) store(p + g * PART, sums(products[g]) * scaling);
}

struct Seen {  // of eight positions; the others may hold what an earlier text left there, which need not be a number
    int first, end;
};

// The values that are seen, weighted, are added to y [G][width + 2]
template <int G, int N, class Vector, class Value>
void weigh(const Value* v, size_t stride, const float* p, Seen seen, int d, int width, float* y) {
    constexpr int lanes = WIDTH<Vector>;
    Vector totals[G][N];
    UNROLLED for (int g = 0; g < G; ++g)
        UNROLLED for (int n = 0; n < N; ++n) totals[g][n] = load<Vector>(y + g * (width + 2) + d + lanes * n);
    for (int j = seen.first; j < seen.end; ++j) {
        Vector some[N];
        UNROLLED for (int n = 0; n < N; ++n) some[n] = some_of<Vector>(v + j * stride + d + lanes * n);
        UNROLLED for (int g = 0; g < G; ++g)
            UNROLLED for (int n = 0; n < N; ++n) totals[g][n] += p[g * PART + j] * some[n];
    }
    UNROLLED for (int g = 0; g < G; ++g)
        UNROLLED for (int n = 0; n < N; ++n) store(y + g * (width + 2) + d + lanes * n, totals[g][n]);
}

template <int G, class Vector, class Value>
void weigh(const Value* v, size_t stride, const float* p, Seen seen, int width, float* y) {
    constexpr int N = G == 1 ? 8 : 4, step = N * WIDTH<Vector>;
    int d = 0;
    for (; d + step <= width; d += step) weigh<G, N, Vector>(v, stride, p, seen, d, width, y);
    for (; d < width; d += WIDTH<Vector>) weigh<G, 1, Vector>(v, stride, p, seen, d, width, y);
}

template <class Do> inline void in_threes(int count, Do&& act) {  // act(first, how many); not three and one
    for (int left = count, some; left; left -= some) {
        some = left < 3 ? left : left == 4 ? 2 : 3;
        if (some == 1) act(count - left, std::integral_constant<int, 1>());
        if (some == 2) act(count - left, std::integral_constant<int, 2>());
        if (some == 3) act(count - left, std::integral_constant<int, 3>());
    }
}

// Inlined, as a call of what only asks for memory may be left out for having no effect
__attribute__((always_inline)) inline void fetch(const void* from, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)from + i);
}

// For the queries of some heads of keys and a part of the text: [largest score, sum of weights, weighted sum of values] of
// each. All heads look at eight positions before any goes on: they lie side by side in memory.
template <class Vector, class Value>
void attend(const Heads& heads, const Text& text, const Pages& pages, const float* q, const Some& some, Desk& desk,
            float* out) {
    const int64_t from = some.part * PART, low = text.first > from ? text.first / 8 * 8 : from;
    const int64_t high = text.position < from + PART - 1 ? text.position : from + PART - 1;
    const int eights = int((high - low) / 8) + 1, width = heads.width, group = heads.queries / heads.keys;
    const int seen_from = int(text.first - low), seen_to = int(high - low);
    const size_t stride = size_t(heads.keys) * width;
    const Rows rows(heads, text, pages, some, low, high, desk);
    // The next keys and these values are on their way meanwhile: each head asks for a share, in the order of memory
    const int some_heads = some.last - some.first;
    const size_t share = some.once && pages.kind <= BF16 ? 8 * stride * sizeof(Value) / some_heads : 0;
    fetch(rows.eights[0][0], share * some_heads);
    for (int i = 0; i < eights; ++i)
        for (int h = some.first; h < some.last; ++h) {
            const size_t at = (h - some.first) * share;
            if (i + 1 < eights) fetch((const char*)rows.eights[0][i + 1] + at, share);
            fetch((const char*)rows.eights[1][i] + at, share);
            in_threes(group, [&](int g, auto count) {
                score<count, Vector>((const Value*)rows.eights[0][i] + h * width, stride, width, q + (h * group + g) * width,
                                     heads.scaling, desk.scores + (h * group + g) * PART + 8 * i);
            });
        }
    for (int g = some.first * group; g < some.last * group; ++g) {
        float *const p = desk.scores + g * PART, *const y = out + g * (width + 2);
        Floats most = Floats{} - INFINITY, total = {};
        for (int i = 0; i < eights; ++i) {
            const Ints place = Ints{0, 1, 2, 3, 4, 5, 6, 7} + 8 * i;
            Floats scores = load<Floats>(p + 8 * i);
            scores = place < seen_from ? Floats{} - INFINITY : scores;
            scores = place > seen_to ? Floats{} - INFINITY : scores;
            store(p + 8 * i, scores);
            most = scores > most ? scores : most;
        }
        const float highest = most_of(most);
        for (int i = 0; i < eights; ++i) {
            const Floats scores = load<Floats>(p + 8 * i);
            const Floats weights = scores == -INFINITY ? Floats{} : exp8(scores - highest);
            store(p + 8 * i, weights);
            total += weights;
        }
        y[0] = highest, y[1] = sum(total);
        for (int d = 0; d < width; d += 8) store(y + 2 + d, Floats{});
    }
    for (int i = 0; i < eights; ++i)
        for (int h = some.first; h < some.last; ++h)
            in_threes(group, [&](int g, auto count) {
                const Seen seen{std::max(0, seen_from - 8 * i), std::min(8, seen_to + 1 - 8 * i)};
                weigh<count, Vector>((const Value*)rows.eights[1][i] + h * width, stride,
                                     desk.scores + (h * group + g) * PART + 8 * i, seen, width,
                                     out + (h * group + g) * (width + 2) + 2);
            });
}

void merge(const float* parts, int count, size_t stride, int width, float* out) {
    float most = -INFINITY, total = 0;
    for (int i = 0; i < count; ++i) most = parts[i * stride] > most ? parts[i * stride] : most;
    for (int d = 0; d < width; d += 8) store(out + d, Floats{});
    for (int i = 0; i < count; ++i) {
        const float* part = parts + i * stride;
        const float factor = std::exp(part[0] - most);
        total += factor * part[1];
        for (int d = 0; d < width; d += 8) store(out + d, load<Floats>(out + d) + factor * load<Floats>(part + 2 + d));
    }
    for (int d = 0; d < width; d += 8) store(out + d, load<Floats>(out + d) / total);
}

}  // namespace
