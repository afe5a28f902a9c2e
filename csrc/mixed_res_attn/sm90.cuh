// SPDX-License-Identifier: Apache-2.0
// sm_90a instructions as functions, named as CUTLASS names them: mbarrier, TMA, wgmma.
//
// Written as PTX and not through CUTLASS: the extension builds wherever nvcc is, in about a minute.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "mixed_res_attn/e4m3.h"

namespace specedit::sm90 {

__device__ inline uint32_t cast_smem_ptr_to_uint(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// The CTA's dynamic shared memory.
__device__ inline void* dynamic_smem() {
  extern __shared__ __align__(1024) uint8_t memory[];
  return memory;
}

// ---- mbarrier -------------------------------------------------------------------------------------------------------

__device__ inline void mbarrier_init(uint64_t* bar, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(cast_smem_ptr_to_uint(bar)), "r"(arrivals) : "memory");
}

// Makes initialised mbarriers visible to the async proxy (TMA).
__device__ inline void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void mbarrier_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(cast_smem_ptr_to_uint(bar)) : "memory");
}

__device__ inline void mbarrier_arrive_and_expect_tx(uint64_t* bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(cast_smem_ptr_to_uint(bar)), "r"(bytes)
               : "memory");
}

__device__ inline bool mbarrier_try_wait(uint64_t* bar, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n\t.reg .pred p;\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
      "selp.u32 %0, 1, 0, p;\n\t}"
      : "=r"(done)
      : "r"(cast_smem_ptr_to_uint(bar)), "r"(parity)
      : "memory");
  return done;
}

// Returns when the phase of this parity has completed. A new mbarrier counts as if its phase of parity 1 had.
__device__ inline void mbarrier_wait(uint64_t* bar, uint32_t parity) {
  while (!mbarrier_try_wait(bar, parity)) {
  }
}

// Named barriers 1 to 15. threads: of the CTA, those that sync and those that only arrive.
__device__ inline void named_barrier_sync(int id, int threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ inline void named_barrier_arrive(int id, int threads) {
  asm volatile("barrier.cta.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- Programmatic dependent launch
// ----------------------------------------------------------------------------------------------------------

// The next grid of the stream may start, if it was launched with programmatic stream serialization.
__device__ inline void launch_dependent_grids() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Returns when the grid before has ended and its writes are visible.
__device__ inline void wait_on_dependent_grids() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- Registers ------------------------------------------------------------------------------------------------------

template <int N>
__device__ inline void warpgroup_reg_alloc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N>
__device__ inline void warpgroup_reg_dealloc() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// ---- Copies ---------------------------------------------------------------------------------------------------------

// Makes shared memory written by stores or cp.async visible to the async proxy (wgmma, TMA).
__device__ inline void fence_view_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void prefetch_tma_descriptor(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Loads a box of a five-dimensional tensor to shared memory; completes on `bar`.
__device__ inline void tma_load(
    void* target, const CUtensorMap* map, uint64_t* bar, int c0, int c1, int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], "
      "[%2];" ::"r"(cast_smem_ptr_to_uint(target)),
      "l"(map), "r"(cast_smem_ptr_to_uint(bar)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// 16 bytes to shared memory, zeros where `valid` is 0; `source` must be a legal address either way.
__device__ inline void cp_async_zfill(uint32_t target, const void* source, uint32_t valid) {
  asm volatile(
      "{\n\t.reg .pred p;\n\t"
      "setp.eq.u32 p, %2, 0;\n\t"
      "cp.async.cg.shared.global [%0], [%1], 16, p;\n\t}" ::"r"(target),
      "l"(source), "r"(valid)
      : "memory");
}

// Prefetches the cache line of an address into L2.
__device__ inline void prefetch_l2(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// For data that is read once: its cache lines are evicted first.
__device__ inline uint4 load_streaming(const uint4* at) {
  uint4 x;
  asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(at));
  return x;
}

// Arrives on `bar` when this thread's cp.async copies so far have completed.
__device__ inline void cp_async_mbarrier_arrive_noinc(uint64_t* bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(cast_smem_ptr_to_uint(bar)) : "memory");
}

// ---- wgmma ----------------------------------------------------------------------------------------------------------

__device__ inline void warpgroup_arrive() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void warpgroup_commit_batch() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
__device__ inline void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

__device__ inline void nanosleep() { asm volatile("nanosleep.u32 20;" ::: "memory"); }

// Keeps the compiler from moving accesses to accumulators across this point.
template <int N>
__device__ inline void warpgroup_fence_operand(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

// Low word of a matrix descriptor (PTX ISA, "matrix descriptor"), which counts units of 16 bytes. `leading`, in bytes.
// Tile with the 128-byte swizzle (panels of 128-byte rows, 1024-byte aligned): from one panel of 64 columns to the
// next, used where the columns are the product's N. Tile without swizzle: from 8 columns to the next 8.
__device__ inline uint32_t smem_descriptor_low(const void* tile, uint32_t leading) {
  return (cast_smem_ptr_to_uint(tile) >> 4) | (leading >> 4) << 16;
}

// The descriptor of a tile with the 128-byte swizzle: 1024 bytes from one group of 8 rows to the next.
__device__ inline uint64_t swizzle128_descriptor(uint32_t low) {
  return static_cast<uint64_t>(0x40000040u) << 32 | low;
}

// That of a tile with the 64-byte swizzle (panels of 64-byte rows): 512 bytes from one group of 8 rows to the next.
__device__ inline uint64_t swizzle64_descriptor(uint32_t low) {
  return static_cast<uint64_t>(0x80000020u) << 32 | low;
}

// That of a tile without swizzle: 8 columns of 8 rows are 128 bytes; `group` bytes from one group of 8 rows to the
// next.
__device__ inline uint64_t no_swizzle_descriptor(uint32_t low, uint32_t group) {
  return static_cast<uint64_t>(group >> 4) << 32 | low;
}

// Returns x. The compiler cannot know that, so it recomputes what depends on x and does not keep it in registers.
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
#define SPECEDIT_LIST64                                                                                           \
  SPECEDIT_LIST32                                                                                                 \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58," \
  "%59,%60,%61,%62,%63"
#define SPECEDIT_LIST88 \
  SPECEDIT_LIST64       \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87"

#define SPECEDIT_LIST96 SPECEDIT_LIST88 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define SPECEDIT_LIST72 SPECEDIT_LIST64 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define SPECEDIT_LIST80 SPECEDIT_LIST72 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define SPECEDIT_LIST104 SPECEDIT_LIST96 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define SPECEDIT_LIST112 SPECEDIT_LIST104 ",%104,%105,%106,%107,%108,%109,%110,%111"

#define SPECEDIT_WGMMA(n, type, flag)                       \
  "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #flag ", 0;\n\t" \
  "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type
#define SPECEDIT_WGMMA_SS(n, type, list, a0, a1, a2, ...)                                         \
  asm volatile(SPECEDIT_WGMMA(n, type, a2) " {" list "}, %" #a0 ", %" #a1 ", p, 1, 1, 0, 0;\n\t}" \
               : __VA_ARGS__                                                                      \
               : "l"(a), "l"(b), "r"(add))
#define SPECEDIT_WGMMA_RS(n, type, list, a0, a1, a2, a3, a4, a5, ...)                                     \
  asm volatile(SPECEDIT_WGMMA(n, type, a5) " {" list "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #a4 \
                                           ", p, 1, 1, 1;\n\t}"                                           \
               : __VA_ARGS__                                                                              \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1))

// m64nNk16, fp32 accumulators. ss: d (+)= a b^T, a [64, 16] and b [N, 16] in shared memory, 16 columns contiguous; add
// = 0 overwrites d. rs: d += a b, a [64, 16] in registers, b [16, N] in shared memory, N contiguous.
template <typename T, int N>
struct Wgmma;

#define SPECEDIT_DEFINE_WGMMA(n, list, a0, a1, a2, a3, a4, a5, ...)                        \
  template <typename T>                                                                    \
  struct Wgmma<T, n> {                                                                     \
    __device__ static inline void ss(float (&d)[n / 2], uint64_t a, uint64_t b, int add) { \
      if constexpr (std::is_same_v<T, __nv_bfloat16>) {                                    \
        SPECEDIT_WGMMA_SS(n, "bf16", list, a0, a1, a2, __VA_ARGS__);                       \
      } else {                                                                             \
        SPECEDIT_WGMMA_SS(n, "f16", list, a0, a1, a2, __VA_ARGS__);                        \
      }                                                                                    \
    }                                                                                      \
    __device__ static inline void rs(float (&d)[n / 2], const uint32_t* a, uint64_t b) {   \
      if constexpr (std::is_same_v<T, __nv_bfloat16>) {                                    \
        SPECEDIT_WGMMA_RS(n, "bf16", list, a0, a1, a2, a3, a4, a5, __VA_ARGS__);           \
      } else {                                                                             \
        SPECEDIT_WGMMA_RS(n, "f16", list, a0, a1, a2, a3, a4, a5, __VA_ARGS__);            \
      }                                                                                    \
    }                                                                                      \
  }

SPECEDIT_DEFINE_WGMMA(64, SPECEDIT_LIST32, 32, 33, 34, 35, 36, 37, SPECEDIT_ACC32(d, 0));
SPECEDIT_DEFINE_WGMMA(128, SPECEDIT_LIST64, 64, 65, 66, 67, 68, 69, SPECEDIT_ACC64(d, 0));
SPECEDIT_DEFINE_WGMMA(
    176, SPECEDIT_LIST88, 88, 89, 90, 91, 92, 93, SPECEDIT_ACC64(d, 0), SPECEDIT_ACC16(d, 64), SPECEDIT_ACC8(d, 80));

SPECEDIT_DEFINE_WGMMA(144, SPECEDIT_LIST72, 72, 73, 74, 75, 76, 77, SPECEDIT_ACC64(d, 0), SPECEDIT_ACC8(d, 64));
SPECEDIT_DEFINE_WGMMA(160, SPECEDIT_LIST80, 80, 81, 82, 83, 84, 85, SPECEDIT_ACC64(d, 0), SPECEDIT_ACC16(d, 64));
SPECEDIT_DEFINE_WGMMA(192, SPECEDIT_LIST96, 96, 97, 98, 99, 100, 101, SPECEDIT_ACC64(d, 0), SPECEDIT_ACC32(d, 64));
SPECEDIT_DEFINE_WGMMA(208, SPECEDIT_LIST104, 104, 105, 106, 107, 108, 109, SPECEDIT_ACC64(d, 0), SPECEDIT_ACC32(d, 64), SPECEDIT_ACC8(d, 96));
SPECEDIT_DEFINE_WGMMA(224, SPECEDIT_LIST112, 112, 113, 114, 115, 116, 117, SPECEDIT_ACC64(d, 0), SPECEDIT_ACC32(d, 64), SPECEDIT_ACC16(d, 96));

// m64nNk32 of e4m3 numbers, fp32 accumulators. Both operands have their 32 columns contiguous, so b of rs is [N, 32].
template <int N>
struct WgmmaE4m3;

template <>
struct WgmmaE4m3<192> {
  __device__ static inline void ss(float (&d)[96], uint64_t a, uint64_t b, int add) {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %98, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n192k32.f32.e4m3.e4m3 {" SPECEDIT_LIST96
                 "}, %96, %97, p, 1, 1;\n\t}"
                 : SPECEDIT_ACC64(d, 0), SPECEDIT_ACC32(d, 64)
                 : "l"(a), "l"(b), "r"(add));
  }
};

template <>
struct WgmmaE4m3<128> {
  __device__ static inline void rs(float (&d)[64], const uint32_t* a, uint64_t b) {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %69, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" SPECEDIT_LIST64
                 "}, {%64, %65, %66, %67}, %68, p, 1, 1;\n\t}"
                 : SPECEDIT_ACC64(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
  }
};

#undef SPECEDIT_DEFINE_WGMMA
#undef SPECEDIT_WGMMA_RS
#undef SPECEDIT_WGMMA_SS
#undef SPECEDIT_WGMMA
#undef SPECEDIT_LIST96
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

__device__ inline int max3(int x, int y, int z) { return __vimax3_s32(x, y, z); }

__device__ inline float add_rounded_up(float x, float y) { return __fadd_ru(x, y); }

// Four values rounded to e4m3 in one register, `x0` in the lowest byte. Beyond 448 they become 448.
__device__ inline uint32_t pack_e4m3(float x0, float x1, float x2, float x3) {
  uint32_t y;
  asm("{\n\t.reg .b16 low, high;\n\t"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n\t"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n\t"
      "mov.b32 %0, {low, high};\n\t}"
      : "=r"(y)
      : "f"(x0), "f"(x1), "f"(x2), "f"(x3));
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
