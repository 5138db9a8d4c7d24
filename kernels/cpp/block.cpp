// Whole decoder blocks for new tokens of some texts, on a processor, and what Python calls.
//
// `kernels/native.py` compiles this file and describes its structs to ctypes; `runtime/block.py` says what a block computes and
// proves it. All blocks of a model are one call, in which threads wait for each other ten times a block.
//
// Legend: a team is the threads of one call; each takes a share of every loop.

#include "pages.h"

#include <algorithm>
#include <functional>

extern "C" {

struct Block {
    Linear qkv, o, gate_up, down;
    const float *norm, *mlp_norm, *q_norm, *k_norm;  // the last two may be null
    float eps, mlp_eps, q_eps, k_eps, scaling;
    int32_t queries, keys, width, act;  // heads, channels of one; act: see Act
    int32_t kind;                       // which of a text's page tables it uses
};

struct Text {  // one new token: where its text's keys and values are, for the layers of one kind
    const int64_t* table;  // pages, used as a ring
    int64_t pages, first, position;  // the first token that it sees, and its own place
};
}

namespace {

constexpr int PART = 64, PAGE = 16;
enum Act { SILU, GELU_TANH };

// Functions

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

inline Floats activate(Floats x, int act) {
    const Floats inner = act == SILU ? x : 1.5957691216f * (x + 0.044715f * x * x * x);
    return x / (1.0f + exp8(-inner));
}

void rms_norm(const float* x, const float* weight, int count, float eps, float* y) {
    Floats squares = {};
    for (int i = 0; i < count; i += 8) squares += load<Floats>(x + i) * load<Floats>(x + i);
    const float factor = 1 / std::sqrt(sum(squares) / count + eps);
    for (int i = 0; i < count; i += 8) store(y + i, load<Floats>(x + i) * factor * load<Floats>(weight + i));
}

void rotate(float* x, const float* cosine, const float* sine, int width) {
    for (int low = 0, high = width / 2; low < width / 2; ++low, ++high) {
        const float a = x[low], b = x[high];
        x[low] = a * cosine[low] - b * sine[low];
        x[high] = b * cosine[high] + a * sine[high];
    }
}

// Attention of one token: parts of 64 positions, each with its own maximum, put together at the end. Which parts there are
// depends on the token's position alone, so its bits do not depend on what else is computed.

struct Scratch {
    Rounded x;
    float *normed, *qkv, *attended, *gated, *parts, *wide;  // wide: of each thread, what it made of codes
};

int parts_of(const Text& text) { return int(text.position / PART - text.first / PART) + 1; }

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

inline float most_of(const float* x, int count) {  // not those that are no numbers
    Floats most = Floats{} - INFINITY;
    int i = 0;
    for (; i + 8 <= count; i += 8) most = load<Floats>(x + i) > most ? load<Floats>(x + i) : most;
    for (; i < count; ++i) most[0] = x[i] > most[0] ? x[i] : most[0];
    return most_of(most);
}

// N vectors of the weighted sum of values; rows: the first of each eight
template <int N> void weigh(const float* const* rows, size_t stride, const float* p, int eights, int d, float* y) {
    Floats totals[N] = {};
    for (int i = 0; i < eights; ++i)
        for (int j = 0; j < 8; ++j)
            UNROLLED for (int n = 0; n < N; ++n) totals[n] += p[8 * i + j] * load<Floats>(rows[i] + j * stride + d + 8 * n);
    UNROLLED for (int n = 0; n < N; ++n) store(y + d + 8 * n, totals[n]);
}

// Where a part's keys and values of one head are, as floats: the first of each eight. Eight positions lie in one page.
struct Part {
    const float* rows[2][PART / 8];
    size_t stride;
};

// What one thread has made floats of codes: a part of one text and head, from its first position that was asked for to `end`
struct Wide {
    float* rows[2];  // [PART][width]
    const int64_t* table = nullptr;
    int64_t part = 0, end = 0;
    int head = 0;

    Part look(const Block& block, const Text& text, const Pages& pages, int h, int64_t from, int64_t low, int64_t high) {
        const int width = block.width;
        if (text.table != table || from != part || h != head) table = text.table, part = from, head = h, end = low;
        Part found;
        found.stride = pages.kind == FLOATS ? size_t(block.keys) * width : width;
        for (int64_t position = low; position <= high; position += 8) {
            const int64_t slot = text.table[position / PAGE % text.pages] * PAGE + position % PAGE;
            for (int which = 0; which < 2; ++which) {
                const Half& half = pages.half[which];
                float* x = rows[which] + (position - from) * width;
                if (pages.kind == FLOATS) x = (float*)half.codes + (slot * block.keys + h) * width;
                else if (position >= end)
                    for (int j = 0; j < 8; ++j)
                        WIDEN_ROW[pages.kind](half, pages.own, (slot + j) * block.keys + h, h, width, x + j * width);
                found.rows[which][(position - low) / 8] = x;
            }
        }
        end = high / 8 * 8 + 8 > end ? high / 8 * 8 + 8 : end;
        return found;
    }
};

// For the queries of one group and a part of the text: [largest score, sum of weights, weighted sum of values] of each.
// Positions before the first or after the last are read with the other ones of their eight and count nothing.
void attend(const Block& block, const Text& text, const Pages& pages, const float* q, int head, int64_t part, Wide& wide,
            float* out) {
    const int64_t from = part * PART, low = text.first > from ? text.first / 8 * 8 : from;
    const int64_t high = text.position < from + PART - 1 ? text.position : from + PART - 1;
    const int eights = int((high - low) / 8) + 1, width = block.width, group = block.queries / block.keys;
    const Part found = wide.look(block, text, pages, head, from, low, high);
    const float *const *k_rows = found.rows[0], *const *v_rows = found.rows[1];
    const size_t stride = found.stride;
    const int seen_from = int(text.first - low), seen_to = int(high - low);
    for (int g = 0; g < group; ++g, q += width, out += width + 2) {
        float p[PART];
        Floats most = Floats{} - INFINITY, total = {};
        for (int i = 0; i < eights; ++i) {
            const float* k = k_rows[i];
            Floats products[8] = {};
            for (int d = 0; d < width; d += 8) {
                const Floats q_d = load<Floats>(q + d);
                UNROLLED for (int j = 0; j < 8; ++j) products[j] += q_d * load<Floats>(k + j * stride + d);
            }
            const Ints place = Ints{0, 1, 2, 3, 4, 5, 6, 7} + 8 * i;
            Floats scores = sums(products) * block.scaling;
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
        int d = 0;
        for (; d + 64 <= width; d += 64) weigh<8>(v_rows, stride, p, eights, d, out + 2);
        for (; d < width; d += 8) weigh<1>(v_rows, stride, p, eights, d, out + 2);
        out[0] = highest, out[1] = sum(total);
    }
}

void merge(const float* parts, int count, size_t stride, int width, float* out) {
    float most = -INFINITY, total = 0;
    for (int i = 0; i < count; ++i) most = parts[i * stride] > most ? parts[i * stride] : most;
    for (int d = 0; d < width; ++d) out[d] = 0;
    for (int i = 0; i < count; ++i) {
        const float* part = parts + i * stride;
        const float factor = std::exp(part[0] - most);
        total += factor * part[1];
        for (int d = 0; d < width; ++d) out[d] += factor * part[2 + d];
    }
    for (int d = 0; d < width; ++d) out[d] /= total;
}

void attention(const Team& team, const Block& block, const Pages& pages, const Text* texts, int count, const Scratch& s) {
    const int width = block.width, group = block.queries / block.keys, heads = block.queries + 2 * block.keys;
    const size_t unit = size_t(group) * (width + 2);
    int64_t units = 0, turn = 0;
    for (int b = 0; b < count; ++b) units += parts_of(texts[b]) * block.keys;
    const int64_t mine = units * team.id / team.count, end = units * (team.id + 1) / team.count;
    Wide wide;
    for (int which = 0; which < 2; ++which) wide.rows[which] = s.wide + size_t(2 * team.id + which) * PART * width;
    size_t before = 0;
    for (int b = 0, next; b < count; b = next) {  // a part stays near for all tokens of its text, which follow each other
        for (next = b + 1; next < count && texts[next].table == texts[b].table;) ++next;
        const int64_t last = texts[next - 1].position / PART;
        for (int64_t part = texts[b].first / PART; part <= last; ++part)
            for (int head = 0; head < block.keys; ++head) {
                size_t at = before;
                for (int i = b; i < next; at += size_t(parts_of(texts[i])) * block.keys, ++i) {
                    const int64_t first = texts[i].first / PART;
                    if (part < first || part > texts[i].position / PART) continue;
                    if (turn >= mine && turn < end)
                        attend(block, texts[i], pages, s.qkv + (size_t(i) * heads + head * group) * width, head, part, wide,
                               s.parts + (at + (part - first) * block.keys + head) * unit);
                    ++turn;
                }
            }
        for (; b < next; ++b) before += size_t(parts_of(texts[b])) * block.keys;
    }
    BARRIER
    const int out = block.queries * width;
    team.share(count, [&](int b) {
        size_t before = 0;
        for (int i = 0; i < b; ++i) before += size_t(parts_of(texts[i])) * block.keys;
        for (int q = 0; q < block.queries; ++q) {
            const float* parts = s.parts + (before + q / group) * unit + size_t(q % group) * (width + 2);
            merge(parts, parts_of(texts[b]), block.keys * unit, width, s.attended + size_t(b) * out + q * width);
        }
        round_token(s.attended + size_t(b) * out, out, block.o.span, b, s.x);
    });
    BARRIER
}

// One block, for some tokens. All write their keys and values before any of them looks

void heads_of(const Team& team, const Block& block, const Pages& pages, const Text* texts, int count, const float* cosine,
              const float* sine, const Scratch& s) {
    const int width = block.width, heads = block.queries + 2 * block.keys;
    team.share(count * heads, [&](int i) {
        const int b = i / heads, head = i % heads, key = head - block.queries;
        float* x = s.qkv + size_t(i) * width;
        if (key < block.keys) {
            const float* weight = key < 0 ? block.q_norm : block.k_norm;
            if (weight) rms_norm(x, weight, width, key < 0 ? block.q_eps : block.k_eps, x);
            rotate(x, cosine + size_t(b) * width, sine + size_t(b) * width, width);
        }
        if (key < 0) return;
        const Text& text = texts[b];
        const int64_t slot = text.table[text.position / PAGE % text.pages] * PAGE + text.position % PAGE;
        keep_row(pages, pages.half[key / block.keys], slot * block.keys + key % block.keys, key % block.keys, width, x);
    });
}

void step(const Team& team, const Block& block, const Pages& pages, const Text* texts, int count, const float* cosine,
          const float* sine, float* hidden, const Scratch& s) {
    const int channels = block.qkv.columns, inner = block.down.columns;
    const auto normed = [&](const float* weight, float eps, int span) {
        team.share(count, [&](int b) {
            rms_norm(hidden + size_t(b) * channels, weight, channels, eps, s.normed + size_t(b) * channels);
            round_token(s.normed + size_t(b) * channels, channels, span, b, s.x);
        });
        BARRIER
    };
    normed(block.norm, block.eps, block.qkv.span);
    project(team, block.qkv, s.x, count, s.qkv, false);
    BARRIER
    heads_of(team, block, pages, texts, count, cosine, sine, s);
    BARRIER
    attention(team, block, pages, texts, count, s);
    project(team, block.o, s.x, count, hidden, true);
    BARRIER
    normed(block.mlp_norm, block.mlp_eps, block.gate_up.span);
    each_pair(team, block.gate_up, inner / ROWS, s.x, count, [&](int t, int token, int n, const Floats* y) {
        for (int i = 0; i < n; ++i)
            store(s.gated + size_t(token + i) * inner + t * ROWS, activate(y[i], block.act) * y[n + i]);
    });
    BARRIER
    team.share(count, [&](int b) { round_token(s.gated + size_t(b) * inner, inner, block.down.span, b, s.x); });
    BARRIER
    project(team, block.down, s.x, count, hidden, true);
    BARRIER
}

}  // namespace

extern "C" {

// y [tokens, rows] of x [tokens, columns], fp32. 0, or 1 where there is no memory.
int32_t infopt_linear(const Linear* w, const float* x, int64_t tokens, float* y) {
    const size_t blocks = w->columns / BLOCK, all = bunched(tokens) * blocks;
    Memory memory(all * (BLOCK + 8) + 256);
    if (!memory.held) return 1;
    const Rounded rounded{memory.take<int8_t>(all * BLOCK), memory.take<float>(all), memory.take<float>(all)};
    parallel([&](const Team& team) {
        team.share(int(tokens), [&](int i) { round_token(x + size_t(i) * w->columns, w->columns, w->span, i, rounded); });
        BARRIER
        project(team, *w, rounded, int(tokens), y, false);
    });
    return 0;
}

// logits [tokens, vocabulary]: the largest ones again, from the weight [vocabulary, columns] as it is stored. The vocabulary is
// cut into spans, eight times as many as `count`; of their largest logits the count-th bounds the count largest of all from below,
// and what is not below it is computed: these and few more.
int32_t infopt_rescore(const void* weight, int32_t type, int32_t columns, const float* x, int32_t tokens, int32_t count,
                       int32_t vocabulary, float* logits) {
    const int span = vocabulary / (8 * count) > 1 ? vocabulary / (8 * count) : 1, spans = (vocabulary + span - 1) / span;
    Memory memory(size_t(tokens) * (2 * spans + 1) * sizeof(float) + 256);
    if (!memory.held) return 1;
    float* const most = memory.take<float>(size_t(tokens) * spans);
    float* const sorted = memory.take<float>(size_t(tokens) * spans);
    float* const least = memory.take<float>(tokens);
    parallel([&](const Team& team) {
        const auto each = [&](auto&& act) {  // span of each token: which, its logits, how many, and which is the first
            team.share(tokens * spans, [&](int i) {
                const int from = i % spans * span, left = vocabulary - from;
                act(i, logits + size_t(i / spans) * vocabulary + from, left < span ? left : span, from);
            });
        };
        each([&](int i, const float* y, int size, int) { sorted[i] = most[i] = most_of(y, size); });
        BARRIER
        team.share(tokens, [&](int t) {
            float *const first = sorted + size_t(t) * spans, *const last = first + count - 1;
            std::nth_element(first, last, first + spans, std::greater<float>());
            least[t] = *last;
        });
        BARRIER
        each([&](int i, float* y, int size, int from) {
            const float* x_of = x + size_t(i / spans) * columns;
            for (int j = 0; most[i] >= least[i / spans] && j < size; ++j) {
                if (!(y[j] >= least[i / spans])) continue;
                Floats total = {};
                for (int c = 0; c < columns; c += 8)
                    total += load<Floats>(x_of + c) * widen(weight, type, size_t(from + j) * columns + c);
                y[j] = sum(total);
            }
        });
    });
    return 0;
}

// hidden [count, channels] after these blocks; pages: of each block; texts [kinds][count]; cosine, sine [count, width].
int32_t infopt_blocks(const Block* blocks, int32_t layers, const Pages* pages, const Text* texts, int32_t count,
                      const float* cosine, const float* sine, float* hidden) {
    size_t widest = 0, qkv = 0, attended = 0, inner = 0, channels = 0, parts = 0, wide = 0;
    const auto more = [](size_t& most, size_t value) { most = value > most ? value : most; };
    for (int i = 0; i < layers; ++i) {
        const Block& block = blocks[i];
        size_t units = 0;
        for (int b = 0; b < count; ++b) units += parts_of(texts[block.kind * count + b]);
        more(parts, units * block.queries * (block.width + 2));
        more(qkv, block.qkv.rows), more(attended, block.o.columns), more(inner, block.down.columns);
        more(channels, block.qkv.columns);
        if (pages[i].kind != FLOATS) more(wide, size_t(most_threads()) * 2 * PART * block.width);
    }
    more(widest, inner), more(widest, attended), more(widest, channels);
    const size_t columns = bunched(count) * widest, floats = count * (channels + qkv + attended + inner) + parts + wide;
    Memory memory(columns * 2 + floats * 4 + 1024);
    if (!memory.held) return 1;
    Scratch s;
    s.x = {memory.take<int8_t>(columns), memory.take<float>(columns / BLOCK), memory.take<float>(columns / BLOCK)};
    s.normed = memory.take<float>(count * channels), s.qkv = memory.take<float>(count * qkv);
    s.attended = memory.take<float>(count * attended), s.gated = memory.take<float>(count * inner);
    s.parts = memory.take<float>(parts), s.wide = memory.take<float>(wide);
    parallel([&](const Team& team) {
        for (int i = 0; i < layers; ++i)
            step(team, blocks[i], pages[i], texts + size_t(blocks[i].kind) * count, count, cosine, sine, hidden, s);
    });
    return 0;
}

// What this was compiled for.
const char* infopt_target() {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return "AVX-512 VNNI";
#elif defined(__AVXVNNI__)
    return "AVX-VNNI";
#elif defined(__AVX2__)
    return "AVX2";
#else
    return "portable";
#endif
}
}
