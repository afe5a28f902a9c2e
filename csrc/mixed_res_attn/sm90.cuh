// SPDX-License-Identifier: Apache-2.0
// sm_90a instructions as functions: barriers, the bulk tensor copy, warp group matrix products.
//
// Written as PTX rather than through a header library: the extension then builds wherever nvcc is, and in seconds.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace specedit::sm90 {

__device__ inline uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// The block's dynamic shared memory.
__device__ inline void* block_memory() {
  extern __shared__ __align__(1024) uint8_t memory[];
  return memory;
}

// ---- mbarrier -------------------------------------------------------------------------------------------------------

__device__ inline void barrier_init(uint64_t* bar, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine.
__device__ inline void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void barrier_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}

__device__ inline void barrier_expect(uint64_t* bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes)
               : "memory");
}

__device__ inline bool barrier_try(uint64_t* bar, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n\t.reg .pred p;\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
      "selp.u32 %0, 1, 0, p;\n\t}"
      : "=r"(done)
      : "r"(shared_address(bar)), "r"(parity)
      : "memory");
  return done;
}

// Returns when the phase of this parity has completed; a fresh barrier counts as past its phase of parity 1.
__device__ inline void barrier_wait(uint64_t* bar, uint32_t parity) {
  while (!barrier_try(bar, parity)) {
  }
}

// Named barriers 1 to 15 among `threads` threads of the block, those that sync and those that only arrive.
__device__ inline void named_sync(int id, int threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ inline void named_arrive(int id, int threads) {
  asm volatile("barrier.cta.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- Grids ----------------------------------------------------------------------------------------------------------

// The next grid of the stream may start, if it was launched to be let.
__device__ inline void let_grid_after_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Returns when the grid before has ended and its writes are visible.
__device__ inline void wait_for_grid_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- Registers ------------------------------------------------------------------------------------------------------

template <int N>
__device__ inline void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N>
__device__ inline void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// ---- Copies ---------------------------------------------------------------------------------------------------------

// Shared memory written by ordinary stores or cp.async, made visible to matrix products and the copy engine.
__device__ inline void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A box of a five-dimensional tensor to shared memory; completes on `bar`.
__device__ inline void copy_box(
    void* target, const CUtensorMap* map, uint64_t* bar, int c0, int c1, int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], "
      "[%2];" ::"r"(shared_address(target)),
      "l"(map), "r"(shared_address(bar)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// 16 bytes to shared memory, zeros where `valid` is 0; `source` must be a legal address either way.
__device__ inline void copy_16(uint32_t target, const void* source, uint32_t valid) {
  asm volatile(
      "{\n\t.reg .pred p;\n\t"
      "setp.eq.u32 p, %2, 0;\n\t"
      "cp.async.cg.shared.global [%0], [%1], 16, p;\n\t}" ::"r"(target),
      "l"(source), "r"(valid)
      : "memory");
}

// The cache line of an address to L2.
__device__ inline void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// Read once: what is written stays in L2 in its stead.
__device__ inline uint4 load_once(const uint4* at) {
  uint4 x;
  asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(at));
  return x;
}

// Arrives on `bar` when this thread's row copies so far have.
__device__ inline void copies_arrive(uint64_t* bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(bar)) : "memory");
}

// ---- wgmma ----------------------------------------------------------------------------------------------------------

__device__ inline void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
__device__ inline void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

__device__ inline void pause() { asm volatile("nanosleep.u32 20;" ::: "memory"); }

// Keeps the compiler from moving accesses to accumulators across this point.
template <int N>
__device__ inline void pin(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

// Low word of a matrix descriptor (PTX ISA, "matrix descriptor"; it counts units of 16 bytes). `leading`, in bytes: of a
// tile in panels of 128-byte rows with the 128-byte swizzle, 1024-byte aligned, from one panel of 64 columns to the next,
// which matters where the columns are the product's N; of a plain tile, from 8 columns to the next 8.
__device__ inline uint32_t tile_descriptor(const void* tile, uint32_t leading) {
  return (shared_address(tile) >> 4) | (leading >> 4) << 16;
}

// The whole descriptor: 1024 bytes from one group of 8 rows to the next, 128-byte swizzle.
__device__ inline uint64_t swizzled_descriptor(uint32_t low) { return static_cast<uint64_t>(0x40000040u) << 32 | low; }

// That of a plain tile: 8 columns of 8 rows are 128 bytes, `group` bytes from one group of 8 rows to the next.
__device__ inline uint64_t plain_descriptor(uint32_t low, uint32_t group) {
  return static_cast<uint64_t>(group >> 4) << 32 | low;
}

// The same value, computed anew at each use: what derives from it is not kept in registers across a loop.
__device__ inline uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

#define SPECEDIT_ACC4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SPECEDIT_ACC8(d, i) SPECEDIT_ACC4(d, i), SPECEDIT_ACC4(d, i + 4)
#define SPECEDIT_ACC16(d, i) SPECEDIT_ACC8(d, i), SPECEDIT_ACC8(d, i + 8)
#define SPECEDIT_ACC32(d, i) SPECEDIT_ACC16(d, i), SPECEDIT_ACC16(d, i + 16)
#define SPECEDIT_ACC64(d, i) SPECEDIT_ACC32(d, i), SPECEDIT_ACC32(d, i + 32)

#define SPECEDIT_LIST32                                                                                    \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27," \
  "%28,%29,%30,%31"
#define SPECEDIT_LIST64                                                                                          \
  SPECEDIT_LIST32                                                                                                \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58," \
  "%59,%60,%61,%62,%63"
#define SPECEDIT_LIST88                                                                                       \
  SPECEDIT_LIST64                                                                                             \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87"

#define SPECEDIT_WGMMA(n, type, flag)                              \
  "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #flag ", 0;\n\t"        \
  "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type
#define SPECEDIT_SHARED_SHARED(n, type, list, a0, a1, a2, ...)                                    \
  asm volatile(SPECEDIT_WGMMA(n, type, a2) " {" list "}, %" #a0 ", %" #a1 ", p, 1, 1, 0, 0;\n\t}" \
               : __VA_ARGS__                                                                      \
               : "l"(a), "l"(b), "r"(add))
#define SPECEDIT_REGISTERS_SHARED(n, type, list, a0, a1, a2, a3, a4, a5, ...)                                        \
  asm volatile(SPECEDIT_WGMMA(n, type, a5) " {" list "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #a4            \
                                           ", p, 1, 1, 1;\n\t}"                                                      \
               : __VA_ARGS__                                                                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1))

// d (+)= a b^T: a [64, 16] and b [N, 16] in shared memory, 16 columns contiguous. add = 0 overwrites d.
// d += a b: a [64, 16] in registers, b [16, N] in shared memory, N contiguous.
template <typename T, int N>
struct Products;

#define SPECEDIT_PRODUCTS(n, list, a0, a1, a2, a3, a4, a5, ...)                                        \
  template <typename T>                                                                                \
  struct Products<T, n> {                                                                              \
    __device__ static inline void shared_shared(float (&d)[n / 2], uint64_t a, uint64_t b, int add) {  \
      if constexpr (std::is_same_v<T, __nv_bfloat16>) {                                                \
        SPECEDIT_SHARED_SHARED(n, "bf16", list, a0, a1, a2, __VA_ARGS__);                              \
      } else {                                                                                         \
        SPECEDIT_SHARED_SHARED(n, "f16", list, a0, a1, a2, __VA_ARGS__);                               \
      }                                                                                                \
    }                                                                                                  \
    __device__ static inline void registers_shared(float (&d)[n / 2], const uint32_t* a, uint64_t b) { \
      if constexpr (std::is_same_v<T, __nv_bfloat16>) {                                                \
        SPECEDIT_REGISTERS_SHARED(n, "bf16", list, a0, a1, a2, a3, a4, a5, __VA_ARGS__);               \
      } else {                                                                                         \
        SPECEDIT_REGISTERS_SHARED(n, "f16", list, a0, a1, a2, a3, a4, a5, __VA_ARGS__);                \
      }                                                                                                \
    }                                                                                                  \
  }

SPECEDIT_PRODUCTS(64, SPECEDIT_LIST32, 32, 33, 34, 35, 36, 37, SPECEDIT_ACC32(d, 0));
SPECEDIT_PRODUCTS(128, SPECEDIT_LIST64, 64, 65, 66, 67, 68, 69, SPECEDIT_ACC64(d, 0));
SPECEDIT_PRODUCTS(
    176, SPECEDIT_LIST88, 88, 89, 90, 91, 92, 93, SPECEDIT_ACC64(d, 0), SPECEDIT_ACC16(d, 64), SPECEDIT_ACC8(d, 80));

#undef SPECEDIT_PRODUCTS
#undef SPECEDIT_REGISTERS_SHARED
#undef SPECEDIT_SHARED_SHARED
#undef SPECEDIT_WGMMA
#undef SPECEDIT_LIST88
#undef SPECEDIT_LIST64
#undef SPECEDIT_LIST32
#undef SPECEDIT_ACC64
#undef SPECEDIT_ACC32
#undef SPECEDIT_ACC16
#undef SPECEDIT_ACC8
#undef SPECEDIT_ACC4

// ---- Arithmetic -----------------------------------------------------------------------------------------------------

__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two values rounded into one register, `low` in the low half.
template <typename T>
__device__ inline uint32_t pack(float low, float high) {
  uint32_t y;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  }
  return y;
}

}  // namespace specedit::sm90
