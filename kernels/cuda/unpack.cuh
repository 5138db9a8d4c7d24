// Codes to fragments: what turns stored bytes into the floating-point operand A of a tensor core, exactly.
//
// A fragment is eight weights of a lane, in four words: (row g, first pair of columns), (row g + 8, first pair), (row g,
// second pair), (row g + 8, second pair). Codes meet their zero point here and their scale later, in fp32, so every number
// made here is a whole one (or an E4M3 value) and nothing rounds.
//
// The tricks are old ones: an integer or-ed into the fraction of a float whose last place is 1 adds itself to it
// (fp16 1024 + q, bf16 128 + q, fp32 2^23 + q). E4M3 keeps its bits and moves to the wider exponent of fp16 or bf16, which
// divides it by 2^8 or 2^120, subnormals too.
#pragma once

enum Weight { INT4, INT8, FP8 };

// zero(z): what `fragment` needs of a zero point; a constant where z is one.
// AFTER: the factor that is still missing from the fragment, to be multiplied into the scale.
template <Weight, typename Activation>
struct Unpack;

// A word has the first pairs in bits 0-3 | 16-19 (row g) and 4-7 | 20-23 (row g + 8), the second pairs eight bits above.
template <>
struct Unpack<INT4, Half> {
  static constexpr int WORDS = 1;
  static constexpr float AFTER = 1.0f;
  struct Zero {
    u32 low, high;
  };
  static DEVICE Zero zero(u32 z) { return {(0x6400u | z) * 0x10001u, (0xd400u | z << 4) * 0x10001u}; }
  static DEVICE void fragment(u32 (&a)[4], const u32* words, Zero upper, Zero lower) {
    const u32 q = words[0], above = q >> 8;
    a[0] = subtract_half2(mask_or(q, 0x000f000fu, 0x64006400u), upper.low);  // (1024 + q) - (1024 + z)
    a[1] = fma_half2(mask_or(q, 0x00f000f0u, 0x64006400u), 0x2c002c00u, lower.high);  // (1024 + 16 q) / 16 - (64 + z)
    a[2] = subtract_half2(mask_or(above, 0x000f000fu, 0x64006400u), upper.low);
    a[3] = fma_half2(mask_or(above, 0x00f000f0u, 0x64006400u), 0x2c002c00u, lower.high);
  }
};

template <>
struct Unpack<INT4, Bfloat> {
  static constexpr int WORDS = 1;
  static constexpr float AFTER = 1.0f;
  typedef u32 Zero;
  static DEVICE Zero zero(u32 z) { return (0xc300u | z) * 0x10001u; }  // -(128 + z)
  static DEVICE void fragment(u32 (&a)[4], const u32* words, Zero upper, Zero lower) {
    const u32 q = words[0], one = 0x3f803f80u;
    a[0] = fma_bfloat2(mask_or(q, 0x000f000fu, 0x43004300u), one, upper);
    a[1] = fma_bfloat2(mask_or(q >> 4, 0x000f000fu, 0x43004300u), one, lower);
    a[2] = fma_bfloat2(mask_or(q >> 8, 0x000f000fu, 0x43004300u), one, upper);
    a[3] = fma_bfloat2(mask_or(q >> 12, 0x000f000fu, 0x43004300u), one, lower);
  }
};

// 8-bit codes: two words, (row g: bytes 0, 1; row g + 8: bytes 2, 3) of the first pairs, then of the second.
template <>
struct Unpack<INT8, Half> {
  static constexpr int WORDS = 2;
  static constexpr float AFTER = 1.0f;
  typedef u32 Zero;
  static DEVICE Zero zero(u32 z) { return (0x6400u | z) * 0x10001u; }
  static DEVICE void fragment(u32 (&a)[4], const u32* words, Zero upper, Zero lower) {
    for (int i = 0; i < 2; i++) {
      a[2 * i] = subtract_half2(bytes_of(words[i], 0x64646464u, 0x4140u), upper);
      a[2 * i + 1] = subtract_half2(bytes_of(words[i], 0x64646464u, 0x4342u), lower);
    }
  }
};

// bf16 has no room for 128 + q with eight bits of q; the difference q - z fits again, and is taken in fp32.
template <>
struct Unpack<INT8, Bfloat> {
  static constexpr int WORDS = 2;
  static constexpr float AFTER = 1.0f;
  typedef float Zero;
  static DEVICE Zero zero(u32 z) { return bits_to_float(0x4b000000u | z); }  // 2^23 + z
  static DEVICE u32 difference(u32 word, u32 byte, Zero z) {
    return float_to_bits(bits_to_float(bytes_of(word, 0x4b000000u, 0x7650u | byte)) - z);
  }
  static DEVICE u32 pair(u32 word, u32 byte, Zero z) {
    return bytes_of(difference(word, byte, z), difference(word, byte + 1, z), 0x7632u);
  }
  static DEVICE void fragment(u32 (&a)[4], const u32* words, Zero upper, Zero lower) {
    for (int i = 0; i < 2; i++) {
      a[2 * i] = pair(words[i], 0, upper);
      a[2 * i + 1] = pair(words[i], 2, lower);
    }
  }
};

// E4M3: as 8-bit codes, but row g is in bytes 1 and 3 and row g + 8 in bytes 0 and 2, so that the signs are in place.
template <>
struct Unpack<FP8, Half> {
  static constexpr int WORDS = 2;
  static constexpr float AFTER = 256.0f;
  typedef u32 Zero;
  static DEVICE Zero zero(u32) { return 0; }
  static DEVICE u32 pair(u32 word) { return mask_or(word, 0x80008000u, (word >> 1) & 0x3f803f80u); }
  static DEVICE void fragment(u32 (&a)[4], const u32* words, Zero, Zero) {
    for (int i = 0; i < 2; i++) {
      a[2 * i] = pair(words[i]);
      a[2 * i + 1] = pair(words[i] << 8);
    }
  }
};

// 2^-120 times an E4M3 value is too small to be multiplied by anything; it is put right before the tensor core.
template <>
struct Unpack<FP8, Bfloat> {
  static constexpr int WORDS = 2;
  static constexpr float AFTER = 1.0f;
  typedef u32 Zero;
  static DEVICE Zero zero(u32) { return 0; }
  static DEVICE u32 pair(u32 word) {
    return fma_bfloat2(mask_or(word, 0x80008000u, (word >> 4) & 0x07f007f0u), 0x7b807b80u, 0x80008000u);
  }
  static DEVICE void fragment(u32 (&a)[4], const u32* words, Zero, Zero) {
    for (int i = 0; i < 2; i++) {
      a[2 * i] = pair(words[i]);
      a[2 * i + 1] = pair(words[i] << 8);
    }
  }
};
