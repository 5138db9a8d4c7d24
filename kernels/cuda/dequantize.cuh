// A packed weight written out in fp16 or bf16, for products with many tokens: one warp for each chunk of a tile.
//
// The layout is that of decode.cuh. A lane holds rows g and g + 8, columns 8 t to 8 t + 7 and 32 columns further on, so it
// writes four vectors of 16 bytes. Each weight is rounded once: (code - zero) * scale, in fp32.
#pragma once

#include "decode.cuh"

struct Dequantize {
  const uint4* weight;
  const u32* scales;
  u16* w;  // [rows, columns], in the order in which they are packed
  int rows, columns;
};

template <typename V>
DEVICE void write_chunk(const Dequantize& d, int tile, int chunk, int lane) {
  typedef typename V::Activation Activation;
  typedef typename V::Codes Codes;
  constexpr int VECTORS = V::VECTORS * CHUNK / V::UNIT, WORDS = Scales<V>::WORDS;
  const int g = lane >> 2, t = lane & 3, chunks = d.columns / CHUNK;
  u32 words[4 * VECTORS];
#pragma unroll
  for (int v = 0; v < VECTORS; v++) {
    const uint4 q = load_once(d.weight + (((size_t)tile * chunks + chunk) * VECTORS + v) * 32 + lane);
    words[4 * v] = q.x, words[4 * v + 1] = q.y, words[4 * v + 2] = q.z, words[4 * v + 3] = q.w;
  }
  u32 entries[WORDS ? WORDS : 4];
  const size_t unit = (size_t)tile * (d.columns / V::UNIT) + chunk * CHUNK / V::UNIT;
  load_words(entries, V::GROUP == 0 ? d.scales + (tile * 8 + g) * 4 : d.scales + (unit * 8 + g) * WORDS);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const u32* entry = entries + (V::GROUP == 32 ? half * Scales<V>::ENTRY : 0);
    const bool row_zeros = V::GROUP == 0 && V::ZEROS;
    const u32 zeros[2] = {row_zeros ? entry[2] : Scales<V>::upper_zero(entry), row_zeros ? entry[3] : Scales<V>::lower_zero(entry)};
    const float scale[2] = {V::GROUP == 0 ? bits_to_float(entry[0]) * Codes::AFTER : Scales<V>::upper(entry),
                            V::GROUP == 0 ? bits_to_float(entry[1]) * Codes::AFTER : Scales<V>::lower(entry)};
    u32 out[2][4];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      u32 a[4];
      Codes::fragment(a, words + (2 * half + j) * Codes::WORDS, Codes::zero(zeros[0]), Codes::zero(zeros[1]));
#pragma unroll
      for (int i = 0; i < 4; i++)
        out[i % 2][2 * j + i / 2] = round_to<Activation>(low_float<Activation>(a[i]) * scale[i % 2]) |
                                    (u32)round_to<Activation>(low_float<Activation>(a[i] >> 16) * scale[i % 2]) << 16;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int row = tile * 16 + g + 8 * i;
      uint4* to = (uint4*)(d.w + (size_t)row * d.columns + chunk * CHUNK + 32 * half + 8 * t);
      if (row < d.rows) store(to, make_uint4(out[i][0], out[i][1], out[i][2], out[i][3]));
    }
  }
}

template <typename V>
DEVICE void dequantize(const Dequantize& d) {
  wait_for_kernel_before();
  const int lane = threadIdx.x & 31, chunks = d.columns / CHUNK, tiles = (d.rows + 15) / 16;
  const int warps = gridDim.x * WARPS;
  for (int i = blockIdx.x * WARPS + (threadIdx.x >> 5); i < tiles * chunks; i += warps)
    write_chunk<V>(d, i / chunks, i % chunks, lane);
}
