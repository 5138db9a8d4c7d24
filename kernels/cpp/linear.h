#pragma once

// Linear layers on packed integer weights, on a processor. `reference.py` says what they compute.
//
//   w = (code - zero) * scale     a scale, and maybe a zero point, for a row and a group of columns
//   x = round(x / s) * s          8 bits, s = max|x| / 127 over a span of columns (32, or all of a token)
//   y = sum over blocks of 32 columns, in order: (scale * s) * (sum of code * x_code - zero * sum of x_code)
//
// The sums of a block are of whole numbers, so they are exact; the order of the rest does not depend on how many tokens
// there are, how they are split, or on threads: a token's y has the same bits in any company.
//
// Layout: a tile is 8 rows (there is an even number of tiles), a register holds 4 columns of each, and a token's 4 codes are multiplied with all 8 rows at once,
// so that no sum runs across a register. Codes of 4 bits lie in pairs: columns j and j + 16 of a block in one byte.
//
// Legend: a vector is 8 lanes; team: the threads of one call, each takes a share of every loop, with barriers between.

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#define BARRIER _Pragma("omp barrier")
#else
#define BARRIER
#endif
#define UNROLLED _Pragma("GCC unroll 8")  // so that what the loop runs over stays in registers

extern "C" {

struct Linear {
    const uint8_t* codes;  // [tiles][blocks][4 or 8 registers of 32 bytes]; 8 bits: code - 128
    const void* scale;     // [tiles][groups][8]
    const void* zero;      // the same shape, bf16; null: the grid's middle everywhere
    const float* bias;     // [tiles * 8], or null
    int32_t rows, columns, bits, group, scale_type, span;  // group: blocks that share a scale; span: columns of x that do
};
}

namespace {

constexpr int ROWS = 8, BLOCK = 32, CHUNK = 64;

typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(32)));
typedef int8_t EightCodes __attribute__((vector_size(8)));
typedef uint16_t EightHalves __attribute__((vector_size(16)));

template <class T> inline T load(const void* from) {
    T value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
}
template <class T> inline void store(void* to, T value) { __builtin_memcpy(to, &value, sizeof value); }
inline Floats floats(Ints x) { return __builtin_convertvector(x, Floats); }
inline float sum(Floats x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

// A pair of tiles lies in one register of 16 rows, or in PARTS of 8. As many tokens are multiplied at once as there are
// registers for: TOKENS

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define ONE_REGISTER
constexpr int PARTS = 1, TOKENS = 8;
#else
constexpr int PARTS = 2, TOKENS = 4;
#endif

typedef float WideFloats __attribute__((vector_size(64 / PARTS)));
typedef int32_t WideInts __attribute__((vector_size(64 / PARTS)));
typedef uint8_t WideBytes __attribute__((vector_size(64 / PARTS)));

// Part p of what belongs to a pair of tiles
template <class Wide, class Half> inline Wide part(int p, Half one, Half two) {
#ifdef ONE_REGISTER
    return (Wide)_mm512_inserti64x4(_mm512_castsi256_si512((__m256i)one), (__m256i)two, 1);
#else
    return p ? two : one;
#endif
}

// Sums of weight codes times activation codes, for the rows of a register, and a start: added first, or last by 16 bits that
// could not hold it

#if defined(__AVXVNNI__) || defined(ONE_REGISTER)

constexpr int SHIFT = 0;  // what was taken from a code of 8 bits before it is multiplied
inline WideInts multiply(WideInts total, WideBytes w, const int8_t* x) {
#ifdef ONE_REGISTER
    return (WideInts)_mm512_dpbusd_epi32((__m512i)total, (__m512i)w, _mm512_set1_epi32(load<int32_t>(x)));
#else
    return (WideInts)_mm256_dpbusd_avx_epi32((__m256i)total, (__m256i)w, _mm256_set1_epi32(load<int32_t>(x)));
#endif
}
template <int BITS> struct Sum {
    WideInts sums;
    Sum(int32_t start = 0) : sums(WideInts{} + start) {}
    void add(WideBytes w, const int8_t* x) { sums = multiply(sums, BITS == 8 ? w ^ 128 : w, x); }
    WideInts total(int32_t) const { return sums; }
};

#elif defined(__AVX2__)

constexpr int SHIFT = 128;
inline Ints widened(__m256i pairs) { return (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
template <int BITS> struct Sum {  // 16 bits hold a block: 16 products of at most 15 * 127
    __m256i pairs = _mm256_setzero_si256();
    Sum(int32_t = 0) {}
    void add(Bytes w, const int8_t* x) {
        const __m256i x_all = _mm256_set1_epi32(load<int32_t>(x));
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16((__m256i)w, x_all));
    }
    Ints total(int32_t start) const { return widened(pairs) + start; }
};
template <> struct Sum<8> {  // 16 bits hold one pair: the sign goes to the other factor, 2 * 128 * 127
    Ints sums;
    Sum(int32_t start = 0) : sums(Ints{} + start) {}
    void add(Bytes w, const int8_t* x) {
        const __m256i x_all = _mm256_sign_epi8(_mm256_set1_epi32(load<int32_t>(x)), (__m256i)w);
        sums += widened(_mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)w), x_all));
    }
    Ints total(int32_t) const { return sums; }
};

#else

constexpr int SHIFT = 128;
template <int BITS> struct Sum {
    int32_t sums[ROWS];
    Sum(int32_t start = 0) { store(sums, Ints{} + start); }
    void add(Bytes w, const int8_t* x) {
        for (int i = 0; i < ROWS; ++i)
            for (int j = 0; j < 4; ++j) sums[i] += (BITS == 8 ? int8_t(w[4 * i + j]) : w[4 * i + j]) * x[j];
    }
    Ints total(int32_t) const { return load<Ints>(sums); }
};

#endif

// Scales as they are stored: bf16, fp16, fp32

struct Bf16 {
    static constexpr int size = 2;
    static Floats widen(const void* from) {
#ifdef __AVX2__
        return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(from)), 16);
#else
        return (Floats)(__builtin_convertvector(load<EightHalves>(from), Ints) << 16);
#endif
    }
};
struct Fp16 {
    static constexpr int size = 2;
    static Floats widen(const void* from) {
#ifdef __F16C__
        return (Floats)_mm256_cvtph_ps(load<__m128i>(from));
#else  // moved to the place of a float's exponent and fraction, which also makes small ones right
        const Ints half = __builtin_convertvector(load<EightHalves>(from), Ints);
        return (Floats)((half & 0x7fff) << 13 | (half & 0x8000) << 16) * 0x1p112f;  // finite ones only
#endif
    }
};
struct Fp32 {
    static constexpr int size = 4;
    static Floats widen(const void* from) { return load<Floats>(from); }
};

inline Floats widen(const void* from, int type, size_t place) {
    const char* at = (const char*)from;
    return type == 0 ? Bf16::widen(at + 2 * place) : type == 1 ? Fp16::widen(at + 2 * place) : Fp32::widen(at + 4 * place);
}

// Activations

struct Rounded {  // tokens lie in bunches, so that a product reads one stretch
    int8_t* codes;  // [bunches][blocks][TOKENS][BLOCK]
    float *scale, *sum;  // [bunches][blocks][TOKENS]; of the codes
    int32_t* start;  // the same shape: less 8 times the sum, which is what the middle of 4 bits takes from a product
};

inline size_t bunched(size_t tokens) { return (tokens + TOKENS - 1) / TOKENS * TOKENS; }

inline float largest(const float* x, int count) {  // |x| as a whole number has the same order, and NaN comes last
    Ints most = {};
    for (int i = 0; i < count; i += 8) {
        const Ints bits = load<Ints>(x + i) & 0x7fffffff;
        most = most > bits ? most : bits;
    }
    int32_t best = 0;
    for (int i = 0; i < 8; ++i) best = most[i] > best ? most[i] : best;
    return load<float>(&best);
}

void round_token(const float* x, int columns, int span, int token, const Rounded& to) {
    size_t place = size_t(token / TOKENS) * (columns / BLOCK) * TOKENS + token % TOKENS;
    float scale = 0;
    for (int start = 0; start < columns; start += BLOCK, place += TOKENS) {
        if (start % span == 0) {
            scale = largest(x + start, span) / 127;
            if (scale < 0x1p-40f) scale = 0x1p-40f;  // not where it is NaN, which has to be seen
        }
        Ints total = {};
        for (int i = 0; i < BLOCK; i += 8) {
            const Floats moved = load<Floats>(x + start + i) / scale + 0x1.8p23f;  // the fraction is now the nearest whole number
            const Ints code = (Ints)moved - 0x4b400000;
            store(to.codes + place * BLOCK + i, __builtin_convertvector(code, EightCodes));
            total += code;
        }
        to.scale[place] = scale;
        to.sum[place] = sum(floats(total)), to.start[place] = int32_t(-8 * to.sum[place]);
    }
}

// Two tiles times N tokens: y[2 n] of tile t, y[2 n + 1] of the other

template <int BITS, class Scale, bool ZEROS, int N>
void tiles(const Linear& w, int t, int other, const Rounded& x, int token, Floats* y) {
    const int blocks = w.columns / BLOCK, groups = blocks / w.group, bytes = BITS * 32;
    const uint8_t *one = w.codes + size_t(t) * blocks * bytes, *two = w.codes + size_t(other) * blocks * bytes;
    const size_t ahead = size_t(other == t + 1 ? 2 : 1) * blocks * bytes;  // the next two tiles are on their way meanwhile
    const char *scales = (const char*)w.scale, *zeros = (const char*)w.zero;
    size_t place = size_t(t) * groups * ROWS;
    const size_t apart = size_t(other - t) * groups * ROWS, bunch = size_t(token / TOKENS) * blocks * TOKENS;
    const int8_t* codes = x.codes + bunch * BLOCK;
    const float *x_scale = x.scale + bunch, *x_sum = x.sum + bunch;
    const int32_t* start = x.start + bunch;
    constexpr int middle = ZEROS ? 0 : BITS == 4 ? 1 : (128 - SHIFT) / 8;  // in eights
    WideFloats totals[PARTS * N], scale[PARTS], zero[PARTS];
    const float* bias = w.bias;
    UNROLLED for (int i = 0; i < PARTS * N; ++i) {
        totals[i] = WideFloats{};
        if (bias) totals[i] = part<WideFloats>(i / N, load<Floats>(bias + t * ROWS), load<Floats>(bias + other * ROWS));
    }
    for (int b = 0, left = 0; b < blocks; ++b, --left, codes += TOKENS * BLOCK) {
        if (left == 0) {
            left = w.group;
            UNROLLED for (int p = 0; p < PARTS; ++p) {
                const auto both = [&](auto type, const char* from) {
                    constexpr int size = decltype(type)::size;
                    return part<WideFloats>(p, type.widen(from + place * size), type.widen(from + (place + apart) * size));
                };
                scale[p] = both(Scale(), scales);
                if (ZEROS) zero[p] = both(Bf16(), zeros) - (BITS == 4 ? 0.0f : SHIFT);
            }
            place += ROWS;
        }
        UNROLLED for (int i = 0; i < BITS * 32; i += 64)
            __builtin_prefetch(one + ahead + i, 0, 2), __builtin_prefetch(two + ahead + i, 0, 2);
        Sum<BITS> sums[PARTS * N];
        UNROLLED for (int i = 0; i < PARTS * N; ++i) sums[i] = Sum<BITS>(middle * start[i % N]);
        for (int r = 0; r < BITS; ++r, one += 32, two += 32) {
            UNROLLED for (int i = 0; i < 8 / BITS * PARTS; ++i) {
                const int p = i % PARTS, half = i / PARTS;
                WideBytes a = part<WideBytes>(p, load<Bytes>(one), load<Bytes>(two));
                if (BITS == 4) a = half ? a >> 4 : a & 15;
                UNROLLED for (int n = 0; n < N; ++n) sums[p * N + n].add(a, codes + n * BLOCK + 16 * half + 4 * r);
            }
        }
        UNROLLED for (int i = 0; i < PARTS * N; ++i) {
            WideFloats exact = __builtin_convertvector(sums[i].total(middle * start[i % N]), WideFloats);
            if (ZEROS) exact -= zero[i / N] * x_sum[i % N];
            totals[i] += (scale[i / N] * x_scale[i % N]) * exact;
        }
        x_scale += TOKENS, x_sum += TOKENS, start += TOKENS;
    }
    UNROLLED for (int i = 0; i < PARTS * N; ++i) store(y + 2 * (i % N) + i / N, totals[i]);
}

typedef void (*Tiles)(const Linear&, int, int, const Rounded&, int, Floats*);
template <int BITS, class Scale, bool ZEROS, size_t... N> const Tiles* passes(std::index_sequence<N...>) {
    static constexpr Tiles each[] = {tiles<BITS, Scale, ZEROS, N + 1>...};  // of 1, 2 .. TOKENS tokens
    return each;
}

template <int BITS, class Scale> const Tiles* tiles_of(const Linear& w) {
    constexpr auto all = std::make_index_sequence<TOKENS>();
    return w.zero ? passes<BITS, Scale, true>(all) : passes<BITS, Scale, false>(all);
}
template <int BITS> const Tiles* tiles_of(const Linear& w) {
    return w.scale_type == 0 ? tiles_of<BITS, Bf16>(w) : w.scale_type == 1 ? tiles_of<BITS, Fp16>(w) : tiles_of<BITS, Fp32>(w);
}
const Tiles* tiles_of(const Linear& w) { return w.bits == 4 ? tiles_of<4>(w) : tiles_of<8>(w); }

struct Team {
    int id = 0, count = 1;
    template <class Do> void share(int items, Do&& act) const {
        for (int i = int64_t(items) * id / count, end = int64_t(items) * (id + 1) / count; i < end; ++i) act(i);
    }
};

int most_threads() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

template <class Do> void parallel(Do&& act) {
#ifdef _OPENMP
#pragma omp parallel
    act(Team{omp_get_thread_num(), omp_get_num_threads()});
#else
    act(Team{});
#endif
}

// Each pair of tiles, t and t + apart, for a chunk of tokens whose codes stay near: put(t, token, tokens, values)
template <class Put>
void each_pair(const Team& team, const Linear& w, int apart, const Rounded& x, int tokens, Put&& put) {
    const Tiles* run = tiles_of(w);
    const int pairs = (w.rows + 2 * ROWS - 1) / (2 * ROWS);
    for (int chunk = 0; chunk < tokens; chunk += CHUNK) {
        const int end = chunk + CHUNK < tokens ? chunk + CHUNK : tokens;
        team.share(pairs, [&](int pair) {
            const int t = apart == 1 ? 2 * pair : pair;
            for (int token = chunk; token < end; token += TOKENS) {
                const int n = end - token < TOKENS ? end - token : TOKENS;
                Floats y[2 * TOKENS];
                run[n - 1](w, t, t + apart, x, token, y);
                put(t, token, n, y);
            }
        });
    }
}

void project(const Team& team, const Linear& w, const Rounded& x, int tokens, float* y, bool add) {
    each_pair(team, w, 1, x, tokens, [&](int t, int token, int n, const Floats* values) {
        for (int i = 0; i < 2 * n; ++i) {
            const int row = (t + i % 2) * ROWS, count = w.rows - row < ROWS ? w.rows - row : ROWS;
            float* to = y + size_t(token + i / 2) * w.rows + row;
            if (count == ROWS) {
                store(to, add ? load<Floats>(to) + values[i] : values[i]);
            } else {
                for (int j = 0; j < count; ++j) to[j] = add ? to[j] + values[i][j] : values[i][j];
            }
        }
    });
}

struct Memory {  // freed together
    std::unique_ptr<void, void (*)(void*)> held{nullptr, std::free};
    size_t used = 0, size;
    explicit Memory(size_t bytes) : held(std::malloc(bytes), std::free), size(bytes) {}
    template <class T> T* take(size_t count) {
        T* at = reinterpret_cast<T*>(static_cast<char*>(held.get()) + used);
        used += (count * sizeof(T) + 63) / 64 * 64;
        return at;
    }
};

inline Rounded rounded_in(Memory& memory, size_t blocks) {
    return {memory.take<int8_t>(blocks * BLOCK), memory.take<float>(blocks), memory.take<float>(blocks),
            memory.take<int32_t>(blocks)};
}

}  // namespace
