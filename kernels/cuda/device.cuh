// The machine as the kernels see it: each instruction that C++ has no word for is one function here, and nothing else in
// this folder is written in assembly. So an emulator can take this file's place (tests/emulator/machine.h does), and
// the kernels need no header of the CUDA toolkit: NVRTC alone compiles them.
//
// Pairs of 16-bit floats travel in one u32, the first in the low half.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__

#if __CUDA_ARCH__ >= 900
constexpr bool CLUSTERS = true;
#else
constexpr bool CLUSTERS = false;
#endif

// The floating types of activations and scales.
struct Half {
  static constexpr int BITS = 16;
};
struct Bfloat {
  static constexpr int BITS = 16;
};
struct Float {
  static constexpr int BITS = 32;
};

// --- memory -------------------------------------------------------------------------------------------------------

// Weights are read once: past the L1, so that the activations stay in it.
DEVICE uint4 load_once(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

DEVICE uint4 load_again(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

template <int N>
DEVICE void load_words(u32 (&to)[N], const u32* p) {
  static_assert(N == 1 || N == 2 || N == 4, "a load has 4, 8 or 16 bytes");
  if constexpr (N == 1) asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(to[0]) : "l"(p));
  if constexpr (N == 2) asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(p));
  if constexpr (N == 4)
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "l"(p));
}

DEVICE u16 load_value(const u16* p) { return __ldg(p); }

// What another block wrote in this launch: from the L2, never from this processor's L1.
DEVICE float4 load_shared_result(const float4* p) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p));
  return v;
}

template <typename T>
DEVICE void store(T* p, T value) {
  *p = value;
}

// From memory to the L2, at some time: whole 16-byte vectors, where the architecture can.
DEVICE void fetch(const char* p, u32 bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes));
#endif
}

// --- order among threads ------------------------------------------------------------------------------------------

DEVICE void block_barrier() { __syncthreads(); }
DEVICE bool block_any(bool mine) { return __syncthreads_or(mine); }
DEVICE void device_fence() { __threadfence(); }

// Counts to `last`, then starts again at 0; the value before.
DEVICE u32 count_up(u32* counter, u32 last) { return atomicInc(counter, last); }

// Until the kernel before has ended and what it wrote can be read; the one after may begin from then on.
DEVICE void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n\tgriddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// --- clusters: blocks that run together and write to each other's shared memory --------------------------------------

template <typename T, int COUNT>
DEVICE T* block_memory() {
  __shared__ T memory[COUNT];
  return memory;
}

#if __CUDA_ARCH__ >= 900
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
#else
DEVICE void cluster_arrive() {}
DEVICE void cluster_wait() {}
#endif

// To where the cluster's block of this number has what this block has at p, in shared memory.
DEVICE void store_to_block(float4* p, int block, float4 v) {
#if __CUDA_ARCH__ >= 900
  u32 at = (u32)__cvta_generic_to_shared(p);
  asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(at) : "r"(block));
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
#endif
}

// --- arithmetic ---------------------------------------------------------------------------------------------------

// (a & mask) | ones
DEVICE u32 mask_or(u32 a, u32 mask, u32 ones) {
  u32 r;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(a), "r"(mask), "r"(ones));
  return r;
}

// Four bytes out of the eight of a (0-3) and b (4-7), chosen by the nibbles of `which`, lowest first.
DEVICE u32 bytes_of(u32 a, u32 b, u32 which) {
  u32 r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(which));
  return r;
}

DEVICE u32 subtract_half2(u32 a, u32 b) {
  u32 r;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

DEVICE u32 fma_half2(u32 a, u32 b, u32 c) {
  u32 r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

DEVICE u32 fma_bfloat2(u32 a, u32 b, u32 c) {
  u32 r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

DEVICE float bits_to_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 float_to_bits(float value) { return __float_as_uint(value); }

// A 16-bit float in the low half of a word as fp32; whatever is in the high half does not matter.
template <typename T>
DEVICE float low_float(u32 word);
template <>
DEVICE float low_float<Half>(u32 word) {
  float r;
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}" : "=f"(r) : "r"(word));
  return r;
}
template <>
DEVICE float low_float<Bfloat>(u32 word) {
  return __uint_as_float(word << 16);
}

// Rounded to nearest, ties to even.
template <typename T>
DEVICE u16 round_to(float value);
template <>
DEVICE u16 round_to<Half>(float value) {
  u16 r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(value));
  return r;
}
template <>
DEVICE u16 round_to<Bfloat>(float value) {
  u16 r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(value));
  return r;
}

// d = a b + c with a [16, 16], b [16, 8], c and d [16, 8] fp32, spread over the 32 lanes of a warp. Lane 4g + t holds
//   a: rows g, g + 8, g, g + 8; columns 2t, 2t + 1 (first two words) and 2t + 8, 2t + 9 (last two)
//   b: rows 2t, 2t + 1 (first word) and 2t + 8, 2t + 9; column g
//   c: row g, columns 2t, 2t + 1; row g + 8, columns 2t, 2t + 1
// (PTX ISA, "Matrix Fragments for mma.m16n8k16").
template <typename T>
DEVICE void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], float c0, float c1, float c2, float c3);
template <>
DEVICE void mma<Half>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], float c0, float c1, float c2, float c3) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
}
template <>
DEVICE void mma<Bfloat>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], float c0, float c1, float c2, float c3) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
}
