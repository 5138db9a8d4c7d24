// y = x W^T for a few tokens (at most 32) and a weight in 4 or 8 bits: a stream of bytes through the tensor cores.
//
// The weight is operand A of m16n8k16 and the tokens are its eight columns, so eight tokens cost one instruction and
// nothing is padded to sixteen. Tokens beyond the last one are copies of it whose results are not stored.
//
// Layout (layout.py makes it, as many bytes as there were codes): tiles of 16 output rows, in them chunks of 64 columns, in
// them one 16-byte vector (two for 8 bits) per lane, so a warp reads 512 contiguous bytes. Lane 4g + t holds rows g and
// g + 8; its fragment j (of 4) columns 32 (j / 2) + 8 t + 4 (j % 2) + {0, 1, 2, 3}. The order of columns within a chunk
// is free, because x is permuted in the same way: by being loaded as two 16-byte vectors, at columns 8 t and 32 + 8 t.
//
// Work: a unit is 128 output rows (one tile for each warp of a block) times the columns of one scale, 64 at least. All units
// in order are cut into as many equal ranges as there are blocks, two blocks for each processor, so every processor streams
// the same number of bytes whatever the shape, in one wave. The warps of a block walk along the same columns, so x is read
// from the L2 once for 128 rows. Loads run `RING` vectors ahead in registers; there is no shared memory.
//
// A block whose range covers all columns of its rows writes y. Otherwise it writes a partial sum, and the block that
// arrives last adds all of them in the order of the columns. No sum depends on time, and none on the number of tokens:
// the same token gives the same bits alone and in a batch.
#pragma once

#include "unpack.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int CHUNK = 64;

struct Decode {
  const uint4* weight;
  const u32* scales;    // see Scales
  const u16* x;         // [tokens, columns]
  const u16* bias;      // [rows], or null
  u16* y;               // [tokens, rows], or [tokens, rows / 2] with SwiGLU
  float4* partial;      // [blocks, 2, WARPS, token tiles, 32]
  u32* arrived;         // zeros, [rows / 128]; zeros again afterwards
  int tokens, rows, columns;
};

// Which kernel: the codes, the type of x and y, the type of stored scales, columns per scale (0: one scale for each row),
// whether each scale has a zero point of its own or all of them are ZERO, tokens / 8, and whether rows g and g + 8 of a
// tile are a gate and what it is multiplied with.
template <Weight CODES, typename Activation_, typename Scale_, int GROUP_, bool ZEROS_, int ZERO_, int TOKENS_, bool SWIGLU_>
struct Variant {
  typedef Activation_ Activation;
  typedef Scale_ Scale;
  typedef Unpack<CODES, Activation_> Codes;
  static constexpr int GROUP = GROUP_, ZERO = ZERO_, TOKENS = TOKENS_;
  static constexpr bool ZEROS = ZEROS_, SWIGLU = SWIGLU_;
  static constexpr int UNIT = GROUP > CHUNK ? GROUP : CHUNK;         // columns
  static constexpr int VECTORS = (CODES == INT4 ? 1 : 2) * UNIT / CHUNK;  // per lane and unit
  static constexpr int RING = TOKENS < 4 ? 8 : 4;                    // vectors in flight per lane; registers bound it
  static constexpr int DEPTH = RING / VECTORS;                       // units in flight
};

// One block's part of a row of tiles: units [from, to) of it.
struct Segment {
  int row, from, to;
};

DEVICE int first_unit(int block, int blocks, int units) {
  const int each = units / blocks, more = units % blocks;
  return block * each + (block < more ? block : more);
}

DEVICE int block_of(int unit, int blocks, int units) {
  const int each = units / blocks, more = units % blocks, large = more * (each + 1);
  return unit < large ? unit / (each + 1) : more + (unit - large) / each;
}

DEVICE Segment segment_at(int unit, int end, int per_row) {
  const int row = unit / per_row, from = unit % per_row, rest = from + end - unit;
  return {row, from, rest < per_row ? rest : per_row};
}

// Scales and zero points as they lie in memory, for rows g and g + 8:
//   groups: words for each unit and g; a 16-bit scale in the low half, its zero point in the high half, or two scales in
//           one word where there are no zero points, or two fp32 scales
//   a scale for each row: {scale, scale of g + 8, zero, zero of g + 8} for each tile and g
template <typename V>
struct Scales {
  static constexpr bool WIDE = V::ZEROS || V::Scale::BITS == 32;
  static constexpr int GROUPS = V::GROUP == 0 ? 0 : V::UNIT / V::GROUP;  // per unit
  static constexpr int ENTRY = WIDE ? 2 : 1;
  static constexpr int WORDS = GROUPS * ENTRY;

  static DEVICE float upper(const u32* entry) { return as_float(entry[0]); }
  static DEVICE float lower(const u32* entry) { return as_float(WIDE ? entry[1] : entry[0] >> 16); }
  static DEVICE u32 upper_zero(const u32* entry) { return V::ZEROS ? entry[0] >> 16 : V::ZERO; }
  static DEVICE u32 lower_zero(const u32* entry) { return V::ZEROS ? entry[1] >> 16 : V::ZERO; }

  static DEVICE float as_float(u32 word) {
    if constexpr (V::Scale::BITS == 32)
      return bits_to_float(word) * V::Codes::AFTER;
    else
      return low_float<typename V::Scale>(word) * V::Codes::AFTER;
  }
};

// What is in flight or at hand of DEPTH units.
template <typename V>
struct Ring {
  static constexpr int WORDS = Scales<V>::WORDS;
  uint4 weight[V::DEPTH][V::VECTORS];
  u32 scale[V::DEPTH][WORDS ? WORDS : 1];

  DEVICE void load(int slot, const uint4* from, const u32* scales) {
#pragma unroll
    for (int v = 0; v < V::VECTORS; v++) weight[slot][v] = load_once(from + v * 32);
    if constexpr (WORDS > 0) load_words(scale[slot], scales);
  }
};

template <typename V>
struct Block {
  typedef typename V::Codes Codes;
  typedef typename Codes::Zero Zero;
  static constexpr int WORDS = Scales<V>::WORDS;

  const Decode& d;
  const int lane, warp, g, t, per_row;
  Ring<V> ring;
  float sum[V::TOKENS][4];
  Zero row_zero[2];  // where each row has one scale
  const uint4* weight;
  const u32* scales;

  DEVICE Block(const Decode& d, int thread)
      : d(d), lane(thread & 31), warp(thread >> 5), g(lane >> 2), t(lane & 3), per_row(d.columns / V::UNIT) {}

  DEVICE int tile(const Segment& s) const { return s.row * WARPS + warp; }
  DEVICE bool has_rows(const Segment& s) const { return tile(s) * 16 < d.rows; }

  // The first DEPTH units of a segment on their way.
  DEVICE void start(const Segment& s) {
    if (!has_rows(s)) return;
    const size_t unit = (size_t)tile(s) * per_row + s.from;
    weight = d.weight + unit * (V::VECTORS * 32) + lane;
    scales = d.scales + (unit * 8 + g) * WORDS;
#pragma unroll
    for (int i = 0; i < V::DEPTH; i++)
      if (s.from + i < s.to) ring.load(i, weight + i * (V::VECTORS * 32), scales + i * (8 * WORDS));
    if constexpr (V::GROUP == 0) {
      const u32* entry = row_entry(s);
      row_zero[0] = Codes::zero(V::ZEROS ? entry[2] : V::ZERO);
      row_zero[1] = Codes::zero(V::ZEROS ? entry[3] : V::ZERO);
    }
  }

  DEVICE const u32* row_entry(const Segment& s) const { return d.scales + (tile(s) * 8 + g) * 4; }

  // sum = this segment's part of the product, scaled (unless each row has one scale: that comes last).
  DEVICE void multiply(const Segment& s) {
#pragma unroll
    for (int n = 0; n < V::TOKENS; n++) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0.0f;
    if (!has_rows(s)) return;
    const u16* x[V::TOKENS];
#pragma unroll
    for (int n = 0; n < V::TOKENS; n++) {
      const int token = n * 8 + g;
      x[n] = d.x + (size_t)(token < d.tokens ? token : d.tokens - 1) * d.columns + s.from * V::UNIT + 8 * t;
    }
    for (int at = s.from; at < s.to; at += V::DEPTH) {
#pragma unroll
      for (int i = 0; i < V::DEPTH; i++) {
        if (at + i >= s.to) break;
        unit(i, x, i * V::UNIT);
        const int ahead = i + V::DEPTH;
        if (at + ahead < s.to) ring.load(i, weight + ahead * (V::VECTORS * 32), scales + ahead * (8 * WORDS));
      }
      weight += V::DEPTH * V::VECTORS * 32;
      scales += V::DEPTH * 8 * WORDS;
#pragma unroll
      for (int n = 0; n < V::TOKENS; n++) x[n] += V::DEPTH * V::UNIT;
    }
  }

  // One unit out of the ring: fragments of as many columns as share a scale, then the scale.
  DEVICE void unit(int slot, const u16* const (&x)[V::TOKENS], int column) {
    constexpr int FRAGMENTS = 4 * V::UNIT / CHUNK, PER_GROUP = V::GROUP == 0 ? FRAGMENTS : V::GROUP / 16;
    u32 words[V::VECTORS * 4];
#pragma unroll
    for (int v = 0; v < V::VECTORS; v++) {
      const uint4 q = ring.weight[slot][v];
      words[4 * v] = q.x, words[4 * v + 1] = q.y, words[4 * v + 2] = q.z, words[4 * v + 3] = q.w;
    }
    float part[V::TOKENS][4];
    uint4 tokens[V::TOKENS];
#pragma unroll
    for (int j = 0; j < FRAGMENTS; j++) {
      const u32* entry = ring.scale[slot] + j / PER_GROUP * Scales<V>::ENTRY;
      Zero upper, lower;
      if constexpr (V::GROUP == 0) {
        upper = row_zero[0], lower = row_zero[1];
      } else {
        upper = Codes::zero(Scales<V>::upper_zero(entry)), lower = Codes::zero(Scales<V>::lower_zero(entry));
      }
      u32 a[4];
      Codes::fragment(a, words + j * Codes::WORDS, upper, lower);
      const bool first = V::GROUP != 0 && j % PER_GROUP == 0, last = V::GROUP != 0 && (j + 1) % PER_GROUP == 0;
#pragma unroll
      for (int n = 0; n < V::TOKENS; n++) {
        if (j % 2 == 0) tokens[n] = load_again((const uint4*)(x[n] + column + j / 2 * 32));
        const u32 b[2] = {j % 2 ? tokens[n].z : tokens[n].x, j % 2 ? tokens[n].w : tokens[n].y};
        float(&to)[4] = V::GROUP == 0 ? sum[n] : part[n];
        if (first)
          mma<typename V::Activation>(to, a, b, 0.0f, 0.0f, 0.0f, 0.0f);
        else
          mma<typename V::Activation>(to, a, b, to[0], to[1], to[2], to[3]);
      }
      if (last) {
        const float up = Scales<V>::upper(entry), low = Scales<V>::lower(entry);
#pragma unroll
        for (int n = 0; n < V::TOKENS; n++) {
          sum[n][0] += up * part[n][0], sum[n][1] += up * part[n][1];
          sum[n][2] += low * part[n][2], sum[n][3] += low * part[n][3];
        }
      }
    }
  }

  DEVICE size_t place(int block, bool second) const {
    return (((size_t)block * 2 + second) * WARPS + warp) * (V::TOKENS * 32) + lane;
  }

  // y, or a partial sum; then y by whoever is the last to bring one for these rows.
  DEVICE void finish(const Segment& s, int block, int blocks, int units) {
    if (s.from != 0 || s.to != per_row) {
      const int begin = s.row * per_row;
      const size_t mine = place(block, first_unit(block, blocks, units) < begin);
#pragma unroll
      for (int n = 0; n < V::TOKENS; n++)
        store(d.partial + mine + n * 32, make_float4(sum[n][0], sum[n][1], sum[n][2], sum[n][3]));
      const int first = block_of(begin, blocks, units), last = block_of(begin + per_row - 1, blocks, units);
      device_fence();
      block_barrier();
      const bool complete = threadIdx.x == 0 && count_up(d.arrived + s.row, last - first) == (u32)(last - first);
      if (!block_any(complete)) return;
      device_fence();
      add_up(begin, first, last, blocks, units);
    }
    if (has_rows(s)) write(s);
  }

  DEVICE void add_up(int begin, int first, int last, int blocks, int units) {
#pragma unroll
    for (int n = 0; n < V::TOKENS; n++) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0.0f;
#pragma unroll(4 / V::TOKENS)  // four vectors on their way; more would not fit into registers
    for (int block = first; block <= last; block++) {
      const size_t from = place(block, first_unit(block, blocks, units) < begin);
#pragma unroll
      for (int n = 0; n < V::TOKENS; n++) {
        const float4 v = load_shared_result(d.partial + from + n * 32);
        sum[n][0] += v.x, sum[n][1] += v.y, sum[n][2] += v.z, sum[n][3] += v.w;
      }
    }
  }

  DEVICE float bias_of(int row) const {
    return d.bias ? low_float<typename V::Activation>(load_value(d.bias + row)) : 0.0f;
  }

  DEVICE void write(const Segment& s) {
    const int row = tile(s) * 16 + g;
    const bool inside[2] = {row < d.rows, row + 8 < d.rows};
    const float bias[2] = {inside[0] ? bias_of(row) : 0.0f, inside[1] ? bias_of(row + 8) : 0.0f};
    float scale[2] = {1.0f, 1.0f};
    if constexpr (V::GROUP == 0) {
      const u32* entry = row_entry(s);
      scale[0] = bits_to_float(entry[0]) * Codes::AFTER, scale[1] = bits_to_float(entry[1]) * Codes::AFTER;
    }
#pragma unroll
    for (int n = 0; n < V::TOKENS; n++)
#pragma unroll
      for (int column = 0; column < 2; column++) {
        const int token = n * 8 + 2 * t + column;
        if (token >= d.tokens) continue;
        const float upper = sum[n][column] * scale[0] + bias[0], lower = sum[n][2 + column] * scale[1] + bias[1];
        if constexpr (V::SWIGLU) {
          const float gated = upper / (1.0f + expf(-upper)) * lower;
          store(d.y + (size_t)token * (d.rows / 2) + tile(s) * 8 + g, round_to<typename V::Activation>(gated));
        } else {
          u16* to = d.y + (size_t)token * d.rows + row;
          if (inside[0]) store(to, round_to<typename V::Activation>(upper));
          if (inside[1]) store(to + 8, round_to<typename V::Activation>(lower));
        }
      }
  }
};

template <typename V>
DEVICE void decode(const Decode& d) {
  const int block = blockIdx.x, blocks = gridDim.x, per_row = d.columns / V::UNIT;
  const int units = (d.rows + 16 * WARPS - 1) / (16 * WARPS) * per_row;
  const int end = first_unit(block + 1, blocks, units);
  Block<V> work(d, threadIdx.x);
  Segment now = segment_at(first_unit(block, blocks, units), end, per_row);
  work.start(now);
  while (true) {
    work.multiply(now);
    const int after = now.row * per_row + now.to;
    const Segment next = segment_at(after, end, per_row);
    if (after < end) work.start(next);  // its loads are on their way while the sums of this one are finished
    work.finish(now, block, blocks, units);
    if (after >= end) return;
    now = next;
  }
}
