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
// Work: a unit is 128 output rows (one tile for each warp of a block) times the columns of one scale, 64 at least. The warps
// of a block walk along the same columns, so x is read from the L2 once for 128 rows; more than 16 tokens by all threads
// together, one unit ahead, into shared memory in the order of fragments. Loads of weights run `RING` vectors ahead in
// registers. Where there are too few rows to fill the GPU, the columns of 128 rows are cut into as many parts (`parts` in
// decode.py), one for each of as many blocks, whose sums are added in the order of the columns: where blocks form clusters
// each tile by one of them, into whose shared memory the others write; elsewhere out of the L2, by whoever arrives last.
//
// No sum depends on time, and none on the number of tokens: the same token gives the same bits alone and in a batch.
//
// Weights do not depend on the kernel before, so their first loads are on their way before it has ended; all else waits.
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
  float4* partial;      // [blocks, token tiles, THREADS], used where there are no clusters
  u32* arrived;         // zeros, [rows / 128], and zeros again afterwards; used there too
  int tokens, rows, columns, parts;
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
  static constexpr int RING = TOKENS == 1 ? 8 : 4;                   // vectors in flight per lane; registers bound it
  static constexpr int DEPTH = RING / VECTORS;                       // units in flight
  static constexpr bool STAGED = TOKENS == 4;  // x goes through shared memory: fewer tokens come faster out of the L1
};

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

  static constexpr int X = V::TOKENS * 64 * V::UNIT / CHUNK;     // vectors of x in a unit
  static constexpr int MINE = (X + THREADS - 1) / THREADS;       // of them at most for a thread
  static constexpr int SLOTS = 14;  // parts of tiles that a block of a cluster adds up, at most

  const Decode& d;
  const int thread, lane, warp, g, t, part, per_row, from, to, tile;  // from, to: its units
  const bool has_rows;
  Ring<V> ring;
  float sum[V::TOKENS][4];
  Zero row_zero[2];  // where each row has one scale
  const uint4* weight;
  const u32* scales;

  DEVICE Block(const Decode& d, int block, int thread)
      : d(d), thread(thread), lane(thread & 31), warp(thread >> 5), g(lane >> 2), t(lane & 3), part(block % d.parts),
        per_row(d.columns / V::UNIT), from(per_row * part / d.parts), to(per_row * (part + 1) / d.parts),
        tile(block / d.parts * WARPS + warp), has_rows(tile * 16 < d.rows) {}

  // The first DEPTH units on their way.
  DEVICE void start() {
    if (!has_rows) return;
    const size_t unit = (size_t)tile * per_row + from;
    weight = d.weight + unit * (V::VECTORS * 32) + lane;
    scales = d.scales + (unit * 8 + g) * WORDS;
#pragma unroll
    for (int i = 0; i < V::DEPTH; i++)
      if (from + i < to) ring.load(i, weight + i * (V::VECTORS * 32), scales + i * (8 * WORDS));
    if constexpr (V::GROUP == 0) {
      const u32* entry = row_entry();
      row_zero[0] = Codes::zero(V::ZEROS ? entry[2] : V::ZERO);
      row_zero[1] = Codes::zero(V::ZEROS ? entry[3] : V::ZERO);
    }
  }

  DEVICE const u32* row_entry() const { return d.scales + (tile * 8 + g) * 4; }

  // x of a unit: [chunk][token tile][32 columns][lane], the 8 columns that a lane multiplies with.
  DEVICE void load_x(uint4 (&to)[MINE], int unit) const {
#pragma unroll
    for (int k = 0; k < MINE; k++) {
      const int i = thread + k * THREADS, token = i / 64 % V::TOKENS * 8 + i % 32 / 4;
      const int column = unit * V::UNIT + i / (64 * V::TOKENS) * CHUNK + i / 32 % 2 * 32 + i % 4 * 8;
      const int there = token < d.tokens ? token : d.tokens - 1;
      if (i < X) to[k] = load_again((const uint4*)(d.x + (size_t)there * d.columns + column));
    }
  }

  DEVICE void store_x(uint4* to, const uint4 (&x)[MINE]) const {
#pragma unroll
    for (int k = 0; k < MINE; k++)
      if (thread + k * THREADS < X) store(to + thread + k * THREADS, x[k]);
  }

  // sum = these units' part of the product, scaled (unless each row has one scale: that comes last).
  DEVICE void multiply() {
#pragma unroll
    for (int n = 0; n < V::TOKENS; n++) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0.0f;
    if (!V::STAGED && !has_rows) return;
    const u16* own[V::TOKENS];  // where x is not staged
#pragma unroll
    for (int n = 0; n < V::TOKENS; n++) {
      const int token = n * 8 + g;
      own[n] = d.x + (size_t)(token < d.tokens ? token : d.tokens - 1) * d.columns + from * V::UNIT + 8 * t;
    }
    uint4* units = V::STAGED ? block_memory<uint4, V::STAGED ? 2 * X : 1>() : nullptr;
    uint4 next[MINE];
    if constexpr (V::STAGED) load_x(next, from);
    for (int at = from; at < to; at += V::DEPTH) {
#pragma unroll
      for (int i = 0; i < V::DEPTH; i++) {
        if (at + i >= to) break;
        if constexpr (V::STAGED) {
          uint4* here = units + (at + i - from) % 2 * X;
          store_x(here, next);
          block_barrier();
          if (at + i + 1 < to) load_x(next, at + i + 1);
          if (!has_rows) continue;
          unit(i, [&](int j, int n) { return here[((j / 2 * V::TOKENS + n) * 2 + j % 2) * 32 + lane]; });
        } else {
          unit(i, [&](int j, int n) { return load_again((const uint4*)(own[n] + i * V::UNIT + j * 32)); });
        }
        const int ahead = i + V::DEPTH;
        if (at + ahead < to) ring.load(i, weight + ahead * (V::VECTORS * 32), scales + ahead * (8 * WORDS));
      }
      weight += V::DEPTH * V::VECTORS * 32;
      scales += V::DEPTH * 8 * WORDS;
#pragma unroll
      for (int n = 0; n < V::TOKENS; n++) own[n] += V::DEPTH * V::UNIT;
    }
  }

  // One unit out of the ring: fragments of as many columns as share a scale, then the scale. x(j, n): what this lane
  // multiplies with of 32 columns and eight tokens.
  template <typename Get>
  DEVICE void unit(int slot, Get x) {
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
        if (j % 2 == 0) tokens[n] = x(j / 2, n);
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

  // Which block of a cluster adds up a tile, and the first of its tiles.
  DEVICE int owner(int warp) const { return warp * d.parts / WARPS; }
  DEVICE int first_tile(int block) const { return (block * WARPS + d.parts - 1) / d.parts; }

  DEVICE float4 vector(int n) const { return make_float4(sum[n][0], sum[n][1], sum[n][2], sum[n][3]); }

  // The sums of all parts, of which this lane's are `step` apart.
  template <typename Load>
  DEVICE void gather(const float4* first, int step, Load load) {
#pragma unroll
    for (int n = 0; n < V::TOKENS; n++) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0.0f;
#pragma unroll(4 / V::TOKENS)  // four vectors on their way; more would not fit into registers
    for (int other = 0; other < d.parts; other++) {
#pragma unroll
      for (int n = 0; n < V::TOKENS; n++) {
        const float4 v = load(first + other * step + n * 32);
        sum[n][0] += v.x, sum[n][1] += v.y, sum[n][2] += v.z, sum[n][3] += v.w;
      }
    }
  }

  // Each warp's sums to the block that adds up its tile; true for a warp that has all of one then.
  DEVICE bool meet_in_cluster() {
    constexpr int PART = V::TOKENS * 32;  // vectors
    float4* sums = block_memory<float4, SLOTS * PART>();
    const int slot = warp - first_tile(owner(warp));
    cluster_wait();  // all of its blocks have begun
#pragma unroll
    for (int n = 0; n < V::TOKENS; n++)
      store_to_block(sums + (slot * d.parts + part) * PART + n * 32 + lane, owner(warp), vector(n));
    cluster_arrive();
    cluster_wait();
    if (owner(warp) != part) return false;
    gather(sums + slot * d.parts * PART + lane, PART, [](const float4* p) { return *p; });
    return true;
  }

  // The block's sums to where the others find them; true for the block that comes last and has all of them then.
  DEVICE bool meet_in_memory(int row) {
    constexpr int PART = V::TOKENS * THREADS;  // vectors
    const u32 last = d.parts - 1;
    float4* first = d.partial + (size_t)row * d.parts * PART + warp * (V::TOKENS * 32) + lane;
#pragma unroll
    for (int n = 0; n < V::TOKENS; n++) store(first + part * PART + n * 32, vector(n));
    device_fence();
    block_barrier();
    const bool complete = thread == 0 && count_up(d.arrived + row, last) == last;
    if (!block_any(complete)) return false;
    device_fence();
    gather(first, PART, load_shared_result);
    return true;
  }

  DEVICE float bias_of(int row) const {
    return d.bias ? low_float<typename V::Activation>(load_value(d.bias + row)) : 0.0f;
  }

  DEVICE void write() const {
    if (!has_rows) return;
    const int row = tile * 16 + g;
    const bool inside[2] = {row < d.rows, row + 8 < d.rows};
    const float bias[2] = {inside[0] ? bias_of(row) : 0.0f, inside[1] ? bias_of(row + 8) : 0.0f};
    float scale[2] = {1.0f, 1.0f};
    if constexpr (V::GROUP == 0) {
      const u32* entry = row_entry();
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
          store(d.y + (size_t)token * (d.rows / 2) + tile * 8 + g, round_to<typename V::Activation>(gated));
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
  Block<V> work(d, blockIdx.x, threadIdx.x);
  work.start();
  if (CLUSTERS && d.parts > 1) cluster_arrive();
  wait_for_kernel_before();
  work.multiply();
  if (d.parts == 1 || (CLUSTERS ? work.meet_in_cluster() : work.meet_in_memory(blockIdx.x / d.parts))) work.write();
}
