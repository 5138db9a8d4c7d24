// y = x W^T for a few tokens (at most 16) and a weight in 4 or 8 bits: a stream of bytes through the tensor cores.
//
// The weight is operand A of m16n8k16 and the tokens are its eight columns, so eight tokens cost one instruction and
// nothing is padded to sixteen. Tokens beyond the last one are copies of it whose results are not stored.
//
// Layout (layout.py makes it, as many bytes as there were codes): tiles of 16 output rows, in them chunks of 64 columns, in
// them one 16-byte vector (two for 8 bits) per lane, so a warp reads 512 contiguous bytes. Lane 4g + t holds rows g and
// g + 8; its fragment j (of 4) columns 32 (j / 2) + 8 t + 4 (j % 2) + {0, 1, 2, 3}. The order of columns within a chunk
// is free, because x is permuted in the same way: by being loaded as two 16-byte vectors, at columns 8 t and 32 + 8 t.
//
// Work: a unit is a tile times the columns of one scale, 64 at least. A warp multiplies units of one tile; loads of weights
// run `RING` vectors ahead in registers. `tiles` warps of a block walk along the same columns, so x comes once from the L2
// for all of them. The columns of a tile are cut into parts, for `cuts` warps of a block times `cluster` blocks, so that every
// processor of the GPU gets as much to do as any other. The sums of the parts are added in the order of the columns: where
// blocks form clusters each tile by one of them, into whose shared memory the others write; elsewhere out of the L2, by
// whoever arrives last.
//
// No sum depends on time, and none on the number of tokens: the same token gives the same bits alone and in a batch.
//
// Weights do not depend on the kernel before, so their first loads are on their way before it has ended; all else waits.
// Memory would still rest while blocks end, others begin, and kernels run that read little: so a warp that has done its part
// asks for pieces of the weight that comes next, spread evenly over it, to be brought to the L2.
#pragma once

#include "unpack.cuh"

constexpr int WARPS = 8;  // of a block, at most
constexpr int THREADS = 32 * WARPS;
constexpr int CHUNK = 64;
constexpr int PIECE = 1024;  // bytes that are fetched ahead at a time

struct Decode {
  const uint4* weight;
  const u32* scales;    // see Scales
  const u16* x;         // [tokens, columns]
  const u16* bias;      // [rows], or null
  u16* y;               // [tokens, rows], or [tokens, rows / 2] with SwiGLU
  float4* partial;      // [tiles, parts, token tiles, 32], used where there are no clusters
  u32* arrived;         // zeros, one for each `tiles` tiles, and zeros again afterwards; used there too
  const char* ahead;    // the weight that comes next
  int tokens, rows, columns;
  int tiles, cuts, cluster;  // see above
  int pieces, stride;   // of what comes next: how many to fetch, and bytes from one to the next
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

  static constexpr int SUMS = 32 * V::TOKENS;  // vectors of a warp
  static constexpr int SLOTS = 16;             // parts of tiles that a block of a cluster adds up, at most

  const Decode& d;
  const int block, lane, warp, g, t;        // block: of its cluster
  const int row, cut, parts, part, per_row, from, to, tile;  // row: of the block's tiles. from, to: its units
  const bool has_rows;
  Ring<V> ring;
  float sum[V::TOKENS][4];
  Zero row_zero[2];  // where each row has one scale
  const uint4* weight;
  const u32* scales;

  DEVICE Block(const Decode& d, int number, int thread)
      : d(d), block(number % d.cluster), lane(thread & 31), warp(thread >> 5), g(lane >> 2), t(lane & 3),
        row(warp % d.tiles), cut(warp / d.tiles), parts(d.cuts * d.cluster), part(block * d.cuts + cut),
        per_row(d.columns / V::UNIT), from(per_row * part / parts), to(per_row * (part + 1) / parts),
        tile(number / d.cluster * d.tiles + row), has_rows(tile * 16 < d.rows) {}

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

  // sum = these units' part of the product, scaled (unless each row has one scale: that comes last).
  DEVICE void multiply() {
#pragma unroll
    for (int n = 0; n < V::TOKENS; n++) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0.0f;
    if (!has_rows) return;
    const u16* own[V::TOKENS];
#pragma unroll
    for (int n = 0; n < V::TOKENS; n++) {
      const int token = n * 8 + g;
      own[n] = d.x + (size_t)(token < d.tokens ? token : d.tokens - 1) * d.columns + from * V::UNIT + 8 * t;
    }
    for (int at = from; at < to; at += V::DEPTH) {
#pragma unroll
      for (int i = 0; i < V::DEPTH; i++) {
        if (at + i >= to) break;
        unit(i, [&](int j, int n) { return load_again((const uint4*)(own[n] + i * V::UNIT + j * 32)); });
        const int ahead = i + V::DEPTH;
        if (at + ahead < to) ring.load(i, weight + ahead * (V::VECTORS * 32), scales + ahead * (8 * WORDS));
      }
      weight += V::DEPTH * V::VECTORS * 32;
      scales += V::DEPTH * 8 * WORDS;
#pragma unroll
      for (int n = 0; n < V::TOKENS; n++) own[n] += V::DEPTH * V::UNIT;
    }
  }

  DEVICE void fetch_ahead() const {
    const int own = d.tiles * d.cuts, warps = gridDim.x * own;
    for (int first = 0; first < d.pieces; first += 32 * warps) {  // all lanes as often: a barrier comes next
      const int i = first + lane * warps + blockIdx.x * own + warp;
      if (i < d.pieces) fetch(d.ahead + (size_t)i * d.stride, PIECE);
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
  DEVICE int owner() const { return row * d.cluster / d.tiles; }
  DEVICE int first_tile() const { return (owner() * d.tiles + d.cluster - 1) / d.cluster; }

  DEVICE float4 vector(int n) const { return make_float4(sum[n][0], sum[n][1], sum[n][2], sum[n][3]); }

  // The sums of all parts, of which this lane's are `step` apart.
  template <typename Load>
  DEVICE void gather(const float4* first, int step, Load load) {
#pragma unroll
    for (int n = 0; n < V::TOKENS; n++) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0.0f;
#pragma unroll(4 / V::TOKENS)  // four vectors on their way; more would not fit into registers
    for (int other = 0; other < parts; other++) {
#pragma unroll
      for (int n = 0; n < V::TOKENS; n++) {
        const float4 v = load(first + other * step + n * 32);
        sum[n][0] += v.x, sum[n][1] += v.y, sum[n][2] += v.z, sum[n][3] += v.w;
      }
    }
  }

  // Each warp's sums to the block that adds up its tile; true for the warp that has all of it then.
  DEVICE bool meet_in_cluster() {
    float4* sums = block_memory<float4, SLOTS * SUMS>() + (row - first_tile()) * parts * SUMS + lane;
    cluster_wait();  // all of its blocks have begun
#pragma unroll
    for (int n = 0; n < V::TOKENS; n++) store_to_block(sums + part * SUMS + n * 32, owner(), vector(n));
    cluster_arrive();
    cluster_wait();
    if (block != owner() || cut) return false;
    gather(sums, SUMS, [](const float4* p) { return *p; });
    return true;
  }

  // The block's sums to where the others find them; true for the block that comes last and has all of them then.
  DEVICE bool meet_in_memory() {
    const u32 last = d.cluster - 1;
    float4* sums = d.partial + (size_t)tile * parts * SUMS + lane;
    if (has_rows)
#pragma unroll
      for (int n = 0; n < V::TOKENS; n++) store(sums + part * SUMS + n * 32, vector(n));
    device_fence();
    block_barrier();
    const bool complete = threadIdx.x == 0 && count_up(d.arrived + blockIdx.x / d.cluster, last) == last;
    if (!block_any(complete)) return false;
    device_fence();
    if (!has_rows || cut) return false;
    gather(sums, SUMS, load_shared_result);
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
  if (CLUSTERS && work.parts > 1) cluster_arrive();
  wait_for_kernel_before();
  work.multiply();
  work.fetch_ahead();
  if (work.parts == 1 || (CLUSTERS ? work.meet_in_cluster() : work.meet_in_memory())) work.write();
}
