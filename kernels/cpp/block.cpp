// Whole decoder blocks for new tokens of some texts, on a processor, and what Python calls.
//
// `kernels/native.py` compiles this file and describes its structs to ctypes; `runtime/block.py` says what a block computes and
// proves it. All blocks of a model are one call, in which threads wait for each other ten times a block.
//
// Legend: a team is the threads of one call; each takes a share of every loop.

#include "attention.h"

#include <algorithm>
#include <functional>

extern "C" {

struct Block {
    Linear qkv, o, gate_up, down;
    const float *norm, *mlp_norm, *q_norm, *k_norm;  // the last two may be null
    float eps, mlp_eps, q_eps, k_eps;
    Heads heads;
    int32_t act, kind;  // see Act; which of a text's page tables it uses
};

}

namespace {

enum Act { SILU, GELU_TANH };

// Functions

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
    const auto turn = [&](auto one, int low, int high) {
        using T = decltype(one);
        const T a = load<T>(x + low), b = load<T>(x + high);
        store(x + low, a * load<T>(cosine + low) - b * load<T>(sine + low));
        store(x + high, b * load<T>(cosine + high) + a * load<T>(sine + high));
    };
    const int half = width / 2, eights = half / 8 * 8;
    for (int i = 0; i < eights; i += 8) turn(Floats{}, i, half + i);
    for (int i = eights; i < half; ++i) turn(0.0f, i, half + i);
}

// Into the coordinates of a balanced cache, and out of them

constexpr int WIDEST = 512;

void enter(const Half& half, int head, int width, float* x) {
    if (!half.into) return;
    float moved[WIDEST];
    for (int d = 0; d < width; d += 8) store(moved + d, load<Floats>(x + d) - load<Floats>(half.center + head * width + d));
    times(moved, half.into + size_t(head) * width * width, width, x);
}

void meet(const Half& keys, int head, int width, float* q) {  // what the center adds is the same for all keys
    if (!keys.back) return;
    float turned[WIDEST];
    times(q, keys.back + size_t(head) * width * width, width, turned);
    std::copy_n(turned, width, q);
}

void leave(const Half& values, int head, int width, float* y) {
    if (!values.back) return;
    float x[WIDEST];
    times(y, values.back + size_t(head) * width * width, width, x);
    for (int d = 0; d < width; d += 8) store(y + d, load<Floats>(x + d) + load<Floats>(values.center + head * width + d));
}

struct Scratch {
    Rounded x;
    float *normed, *qkv, *attended, *gated, *parts, *desks;
};

void attention(const Team& team, const Block& block, const Pages& pages, const Text* texts, int count, const Scratch& s) {
    const int width = block.heads.width, heads = block.heads.queries + 2 * block.heads.keys;
    const size_t unit = size_t(block.heads.queries) * (width + 2);
    int64_t units = 0, turn = 0;
    for (int b = 0; b < count; ++b) units += parts_of(texts[b]) * block.heads.keys;
    const int64_t mine = units * team.id / team.count, end = units * (team.id + 1) / team.count;
    const size_t queries = block.heads.queries, desk_size = PART * (queries + 2 * size_t(block.heads.keys) * width);
    float* const at_desk = s.desks + team.id * desk_size;
    Desk desk{at_desk, {at_desk + PART * queries, at_desk + (desk_size + PART * queries) / 2}};
    const bool eights = width % WIDTH<Lanes>;
    const auto half = eights ? attend<Floats, uint16_t> : attend<Lanes, uint16_t>;
    const auto run = pages.kind == BF16 ? half : eights ? attend<Floats, float> : attend<Lanes, float>;
    size_t before = 0;
    for (int b = 0, next; b < count; b = next) {  // the tokens of a text follow each other
        for (next = b + 1; next < count && texts[next].table == texts[b].table;) ++next;
        const int64_t last = texts[next - 1].position / PART;
        const int together = next - b > 1 ? 1 : block.heads.keys;  // one head's part stays near for all its tokens
        for (int64_t part = texts[b].first / PART; part <= last; ++part)
            for (int head = 0; head < block.heads.keys; head += together) {
                size_t at = before;
                for (int i = b; i < next; at += size_t(parts_of(texts[i])), ++i) {
                    const int64_t first = texts[i].first / PART;
                    if (part < first || part > texts[i].position / PART) continue;
                    const int64_t start = std::max(mine, turn), stop = std::min(end, turn + together);
                    const Some some{int(head + start - turn), int(head + stop - turn), part, next - b == 1};
                    const float* q = s.qkv + size_t(i) * heads * width;
                    if (start < stop) run(block.heads, texts[i], pages, q, some, desk, s.parts + (at + part - first) * unit);
                    turn += together;
                }
            }
        for (; b < next; ++b) before += parts_of(texts[b]);
    }
    BARRIER
    const int out = block.heads.queries * width;
    team.share(count, [&](int b) {
        size_t before = 0;
        for (int i = 0; i < b; ++i) before += parts_of(texts[i]);
        for (int q = 0; q < block.heads.queries; ++q) {
            const float* parts = s.parts + before * unit + size_t(q) * (width + 2);
            float* const y = s.attended + size_t(b) * out + q * width;
            merge(parts, parts_of(texts[b]), unit, width, y);
            leave(pages.half[1], q / (block.heads.queries / block.heads.keys), width, y);
        }
        round_token(s.attended + size_t(b) * out, out, block.o.span, b, s.x);
    });
    BARRIER
}

// One block, for some tokens. All write their keys and values before any of them looks

void heads_of(const Team& team, const Block& block, const Pages& pages, const Text* texts, int count, const float* cosine,
              const float* sine, const Scratch& s) {
    const int width = block.heads.width, heads = block.heads.queries + 2 * block.heads.keys;
    team.share(count * heads, [&](int i) {
        const int b = i / heads, head = i % heads, key = head - block.heads.queries;
        float* x = s.qkv + size_t(i) * width;
        if (key < block.heads.keys) {
            const float* weight = key < 0 ? block.q_norm : block.k_norm;
            if (weight) rms_norm(x, weight, width, key < 0 ? block.q_eps : block.k_eps, x);
            rotate(x, cosine + size_t(b) * width, sine + size_t(b) * width, width);
        }
        if (key < 0) return meet(pages.half[0], head / (block.heads.queries / block.heads.keys), width, x);
        const int of = key % block.heads.keys, which = key / block.heads.keys;
        const int64_t place = texts[b].position, row = slot_of(texts[b], place) * block.heads.keys + of;
        enter(pages.half[which], of, width, x);
        if (place < pages.sinks) std::copy_n(x, width, sink_of(texts[b], pages, block.heads, which, place, of));
        keep_row(pages, pages.half[which], row, of, width, x);
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
            store(s.gated + size_t(token + i) * inner + t * ROWS, activate(y[2 * i], block.act) * y[2 * i + 1]);
    });
    BARRIER
    team.share(count, [&](int b) { round_token(s.gated + size_t(b) * inner, inner, block.down.span, b, s.x); });
    BARRIER
    project(team, block.down, s.x, count, hidden, true);
    BARRIER
}

inline float most_of(const float* x, int count) {  // not those that are no numbers
    Floats most = Floats{} - INFINITY;
    int i = 0;
    for (; i + 8 <= count; i += 8) most = load<Floats>(x + i) > most ? load<Floats>(x + i) : most;
    for (; i < count; ++i) most[0] = x[i] > most[0] ? x[i] : most[0];
    return most_of(most);
}

}  // namespace

extern "C" {

// y [tokens, rows] of x [tokens, columns], fp32. 0, or 1 where there is no memory.
int32_t infopt_linear(const Linear* w, const float* x, int64_t tokens, float* y) {
    const size_t blocks = w->columns / BLOCK, all = bunched(tokens) * blocks;
    Memory memory(all * (BLOCK + 12) + 256);
    if (!memory.held) return 1;
    const Rounded rounded = rounded_in(memory, all);
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
                Floats totals[4] = {};  // which do not wait for each other
                const size_t row = size_t(from + j) * columns;
                for (int c = 0; c < columns; c += BLOCK)
                    UNROLLED for (int i = 0; i < 4; ++i)
                        totals[i] += load<Floats>(x_of + c + 8 * i) * widen(weight, type, row + c + 8 * i);
                y[j] = sum((totals[0] + totals[1]) + (totals[2] + totals[3]));
            }
        });
    });
    return 0;
}

// hidden [count, channels] after these blocks; pages: of each block; texts [kinds][count]; cosine, sine [count, width].
int32_t infopt_blocks(const Block* blocks, int32_t layers, const Pages* pages, const Text* texts, int32_t count,
                      const float* cosine, const float* sine, float* hidden) {
    size_t widest = 0, qkv = 0, attended = 0, inner = 0, channels = 0, parts = 0, desk = 0;
    const auto more = [](size_t& most, size_t value) { most = value > most ? value : most; };
    for (int i = 0; i < layers; ++i) {
        const Block& block = blocks[i];
        size_t units = 0;
        for (int b = 0; b < count; ++b) units += parts_of(texts[block.kind * count + b]);
        more(parts, units * block.heads.queries * (block.heads.width + 2));
        more(qkv, block.qkv.rows), more(attended, block.o.columns), more(inner, block.down.columns);
        more(channels, block.qkv.columns);
        more(desk, PART * (block.heads.queries + 2 * size_t(block.heads.keys) * block.heads.width));
    }
    more(widest, inner), more(widest, attended), more(widest, channels);
    const size_t columns = bunched(count) * widest, desks = most_threads() * desk;
    const size_t floats = count * (channels + qkv + attended + inner) + parts + desks;
    Memory memory(columns * 2 + floats * 4 + 1024);
    if (!memory.held) return 1;
    Scratch s;
    s.x = rounded_in(memory, columns / BLOCK);
    s.normed = memory.take<float>(count * channels), s.qkv = memory.take<float>(count * qkv);
    s.attended = memory.take<float>(count * attended), s.gated = memory.take<float>(count * inner);
    s.parts = memory.take<float>(parts), s.desks = memory.take<float>(desks);
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
