// In place of kernels/cuda/device.cuh: the same functions for a processor, so that g++ can compile the kernels and a test
// can run them. Every CUDA thread is a fiber. The lanes of a warp meet at each `mma`, the threads of a block at each
// barrier, and all blocks of the grid are under way at once.
//
// Between two such meetings threads run in an order that a seed decides, and unfairly so: each warp has a priority, and
// the least of them runs only when all others wait, until two of them change places. A kernel that lacks a barrier then
// reads what was not yet written. Buffers are registered; a load or store outside of them is a fault, and so is what a
// kernel does too early, before the one before it has ended. Not modelled: caches and the order in which a warp's stores
// become visible (a missing fence goes unnoticed), bank conflicts, time.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;
#define DEVICE inline
#ifdef WITH_CLUSTERS
constexpr bool CLUSTERS = true;
#else
constexpr bool CLUSTERS = false;
#endif

struct Half {
  static constexpr int BITS = 16;
};
struct Bfloat {
  static constexpr int BITS = 16;
};
struct Float {
  static constexpr int BITS = 32;
};
struct uint4 {
  u32 x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Index {
  int x;
};
static Index threadIdx, blockIdx, gridDim;

namespace emulator {

constexpr int LANES = 32;
constexpr size_t STACK = 64 * 1024;
constexpr size_t MEMORY = 48 * 1024;  // of a block

// All of these begin as zeros.
struct Fiber {
  jmp_buf state;
  bool started, done, waits, waits_for_cluster, may_read;
  int phase;
  size_t memory;  // of its block's, that it has asked for
};
struct Warp {
  u32 a[LANES][4], b[LANES][2];
  float c[LANES][4];
  float (*d[LANES])[4];
  int arrived;
};
struct Block {
  int waiting, left;
  bool any, answer, begun;
};
struct Cluster {
  int arrived, phase;
};
struct Buffer {
  const char* begin;
  const char* end;
};

static Fiber* fibers;
static Warp* warps;
static Block* blocks;
static Cluster* clusters;
static char* memory;  // of all blocks
static const Buffer* buffers;
static int buffer_count;
static void (*body)(const void* arguments);
static const void* body_arguments;
static const char* fault;  // what went wrong first
static u32 state;          // of the scheduler's random numbers
static jmp_buf scheduler;
static int current, threads, cluster_size;

inline void failed(const char* what) {
  if (!fault) fault = what;
}

inline u32 random_below(u32 limit) {  // xorshift32
  state ^= state << 13;
  state ^= state >> 17;
  state ^= state << 5;
  return state % limit;
}

inline char* block_memory(int block) { return memory + block * MEMORY; }
template <typename T>
bool inside(const T* p) {
  const char* at = (const char*)p;
  const char* own = block_memory(current / threads);
  if (at >= own && at + sizeof(T) <= own + MEMORY) return true;
  for (int i = 0; i < buffer_count; i++)
    if (at >= buffers[i].begin && at + sizeof(T) <= buffers[i].end) {
      if ((at - buffers[i].begin) % sizeof(T)) failed("an unaligned access");
      return true;
    }
  failed("an access outside of every buffer");
  return false;
}

inline void leave() {
  if (!_setjmp(fibers[current].state)) _longjmp(scheduler, 1);
}

inline void wait() {
  fibers[current].waits = true;
  leave();
}

inline void entry() {
  body(body_arguments);
  fibers[current].done = true;
  _longjmp(scheduler, 1);
}

inline void resume(int thread, char* stacks) {
  Fiber& f = fibers[thread];
  current = thread;
  threadIdx.x = thread % threads;
  blockIdx.x = thread / threads;
  if (_setjmp(scheduler)) return;
  if (f.started) _longjmp(f.state, 1);
  f.started = blocks[thread / threads].begun = true;
  static ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stacks + thread * STACK;
  context.uc_stack.ss_size = STACK;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
  setcontext(&context);
}

inline void release(int from, int count) {
  for (int i = from; i < from + count; i++) fibers[i].waits = false;
}

// A block's threads go on once every one that has not returned is here.
inline bool meet(bool mine) {
  Block& block = blocks[current / threads];
  block.any |= mine;
  if (++block.waiting == block.left) {
    block.answer = block.any;
    block.any = false;
    block.waiting = 0;
    release(current / threads * threads, threads);
  } else {
    wait();
  }
  return block.answer;
}

inline Cluster& own_cluster() { return clusters[current / (threads * cluster_size)]; }

inline void cluster_arrive() {
  Cluster& cluster = own_cluster();
  const int count = threads * cluster_size, first = current / count * count;
  fibers[current].phase = cluster.phase;
  if (++cluster.arrived < count) return;
  cluster.arrived = 0;
  cluster.phase++;
  for (int i = first; i < first + count; i++)
    if (fibers[i].waits_for_cluster) fibers[i].waits = fibers[i].waits_for_cluster = false;
}

inline void cluster_wait() {
  leave();
  if (own_cluster().phase != fibers[current].phase) return;
  fibers[current].waits_for_cluster = true;
  wait();
}

inline void must_be_late() {
  if (!fibers[current].may_read) failed("it does not wait for the kernel before");
}

// Runs `run` for every thread of every block; nothing, or what went wrong.
inline const char* launch(
    int grid, int threads_per_block, int blocks_per_cluster, u32 seed, void (*run)(const void*), const void* arguments) {
  threads = threads_per_block;
  cluster_size = blocks_per_cluster;
  const int total = grid * threads, warp_count = total / LANES;
  body = run;
  body_arguments = arguments;
  fault = nullptr;
  state = seed * 2654435761u + 1;
  gridDim.x = grid;
  fibers = (Fiber*)calloc(total, sizeof(Fiber));
  warps = (Warp*)calloc(warp_count, sizeof(Warp));
  blocks = (Block*)calloc(grid, sizeof(Block));
  clusters = (Cluster*)calloc(grid, sizeof(Cluster));
  memory = (char*)malloc(grid * MEMORY);
  memset(memory, 0xff, grid * MEMORY);  // NaN
  for (int i = 0; i < grid; i++) blocks[i].left = threads;
  char* stacks = (char*)mmap(nullptr, total * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  int* order = (int*)malloc(warp_count * sizeof(int));
  for (int i = 0; i < warp_count; i++) {
    const int j = random_below(i + 1);
    order[i] = order[j];
    order[j] = i;
  }
  int left = total;
  while (left > 0 && !fault) {
    bool moved = false;
    for (int at = 0; at < warp_count && !moved; at++) {
      const int w = order[at], turn = random_below(LANES);
      for (int i = 0; i < LANES; i++) {
        const int thread = w * LANES + (i + turn) % LANES;
        if (fibers[thread].done || fibers[thread].waits) continue;
        resume(thread, stacks);
        moved = true;
        if (fibers[thread].done) {
          left--;
          Block& block = blocks[thread / threads];
          block.left--;
          if (!block.left) block.begun = false;
          if (block.left && block.waiting == block.left) failed("a thread returned while others wait at a barrier");
        }
      }
    }
    if (!moved) failed("a deadlock: every thread waits");
    if (random_below(4)) continue;
    const int i = random_below(warp_count), j = random_below(warp_count), other = order[i];
    order[i] = order[j], order[j] = other;
  }
  munmap(stacks, total * STACK);
  free(fibers), free(warps), free(blocks), free(clusters), free(memory), free(order);
  return fault;
}

inline _Float16 half(u32 bits) {
  const u16 low = (u16)bits;
  _Float16 h;
  memcpy(&h, &low, 2);
  return h;
}
inline u32 half_bits(_Float16 h) {
  u16 bits;
  memcpy(&bits, &h, 2);
  return bits;
}
inline float from_bits(u32 bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline u32 to_bits(float f) {
  u32 bits;
  memcpy(&bits, &f, 4);
  return bits;
}
inline u32 bfloat_bits(float f) {
  const u32 bits = to_bits(f);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

}  // namespace emulator

template <typename T>
inline T read(const T* p) {
  return emulator::inside(p) ? *p : T{};
}
inline uint4 load_once(const uint4* p) { return read(p); }
inline uint4 load_again(const uint4* p) { return emulator::must_be_late(), read(p); }
inline u16 load_value(const u16* p) { return emulator::must_be_late(), read(p); }
inline float4 load_shared_result(const float4* p) { return emulator::must_be_late(), read(p); }
inline void store_to_block(float4* p, int block, float4 v) {
  using namespace emulator;
  leave();
  const int own = current / threads, other = own / cluster_size * cluster_size + block;
  if (!blocks[other].begun) failed("a store to a block that has not begun, or has ended");
  if (inside(p)) *(float4*)((char*)p + (other - own) * (intptr_t)MEMORY) = v;
}
template <int N>
inline void load_words(u32 (&to)[N], const u32* p) {
  struct alignas(4 * N) Vector {
    u32 word[N];
  };
  const Vector v = read((const Vector*)p);
  memcpy(to, &v, sizeof(v));
}
template <typename T>
inline void store(T* p, T value) {
  emulator::must_be_late();
  if (emulator::inside(p)) *p = value;
}
inline void fetch(const char* p, u32 bytes) {
  if ((intptr_t)p % 16 || bytes % 16) emulator::failed("an unaligned fetch");
  emulator::inside(p), emulator::inside(p + bytes - 1);
}
inline void wait_for_kernel_before() { emulator::fibers[emulator::current].may_read = true; }
template <typename T, int COUNT>
inline T* block_memory() {
  using namespace emulator;
  Fiber& f = fibers[current];  // all threads of a block ask for the same, in the same order
  f.memory += sizeof(T) * COUNT;
  if (f.memory > MEMORY) failed("a block that needs more memory than there is");
  return (T*)(emulator::block_memory(current / threads) + f.memory - sizeof(T) * COUNT);
}
inline void cluster_arrive() { emulator::cluster_arrive(); }
inline void cluster_wait() { emulator::cluster_wait(); }

inline void block_barrier() { emulator::meet(false); }
inline bool block_any(bool mine) { return emulator::meet(mine); }
inline void device_fence() { emulator::leave(); }
inline u32 count_up(u32* counter, u32 last) {
  emulator::leave();
  const u32 before = read(counter);
  store(counter, before >= last ? 0 : before + 1);
  return before;
}

inline u32 mask_or(u32 a, u32 mask, u32 ones) { return (a & mask) | ones; }
inline u32 bytes_of(u32 a, u32 b, u32 which) {
  const u64 all = (u64)b << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; i++) r |= (u32)(all >> (8 * ((which >> (4 * i)) & 7)) & 0xff) << (8 * i);
  return r;
}
inline float bits_to_float(u32 bits) { return emulator::from_bits(bits); }
inline u32 float_to_bits(float value) { return emulator::to_bits(value); }
template <typename T>
inline float low_float(u32 word);
template <>
inline float low_float<Half>(u32 word) {
  return (float)emulator::half(word);
}
template <>
inline float low_float<Bfloat>(u32 word) {
  return emulator::from_bits(word << 16);
}
template <typename T>
inline u16 round_to(float value);
template <>
inline u16 round_to<Half>(float value) {
  return (u16)emulator::half_bits((_Float16)value);
}
template <>
inline u16 round_to<Bfloat>(float value) {
  return (u16)emulator::bfloat_bits(value);
}
// A product of two 16-bit floats and its sum with a third are exact in fp64, or so nearly that one rounding remains.
template <typename T, typename F>
inline u32 pairwise(u32 a, u32 b, u32 c, F f) {
  u32 r = 0;
  for (int i = 0; i < 32; i += 16)
    r |= (u32)round_to<T>((float)f((double)low_float<T>(a >> i), (double)low_float<T>(b >> i), (double)low_float<T>(c >> i))) << i;
  return r;
}
inline u32 subtract_half2(u32 a, u32 b) {
  return pairwise<Half>(a, b, 0, [](double x, double y, double) { return x - y; });
}
inline u32 fma_half2(u32 a, u32 b, u32 c) {
  return pairwise<Half>(a, b, c, [](double x, double y, double z) { return x * y + z; });
}
inline u32 fma_bfloat2(u32 a, u32 b, u32 c) {
  return pairwise<Bfloat>(a, b, c, [](double x, double y, double z) { return x * y + z; });
}

template <typename T>
inline void whole_warp(emulator::Warp& w) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++)
      for (int e = 0; e < 2; e++) a[g + i % 2 * 8][2 * t + i / 2 * 8 + e] = low_float<T>(w.a[lane][i] >> (16 * e));
    for (int i = 0; i < 2; i++)
      for (int e = 0; e < 2; e++) b[2 * t + i * 8 + e][g] = low_float<T>(w.b[lane][i] >> (16 * e));
  }
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float total = 0;
      for (int k = 0; k < 16; k++) total += a[row][k] * b[k][column];
      (*w.d[lane])[i] = w.c[lane][i] + total;
    }
}

template <typename T>
inline void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], float c0, float c1, float c2, float c3) {
  using namespace emulator;
  Warp& w = warps[current / LANES];
  const int lane = current % LANES;
  memcpy(w.a[lane], a, sizeof(a));
  memcpy(w.b[lane], b, sizeof(b));
  const float c[4] = {c0, c1, c2, c3};
  memcpy(w.c[lane], c, sizeof(c));
  w.d[lane] = &d;
  if (++w.arrived < LANES) {
    wait();
    return;
  }
  whole_warp<T>(w);
  w.arrived = 0;
  release(current / LANES * LANES, LANES);
}
