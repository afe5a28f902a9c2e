// SPDX-License-Identifier: Apache-2.0
// The instructions of csrc/mixed_res_attn/sm90.cuh on the CPU. Asynchronous ones act late: tma_load some turns after it
// was issued, cp.async and wgmma when they are waited for, with what memory and registers then hold.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "emulator.h"
#include "mixed_res_attn/e4m3.h"

namespace specedit::sm90 {

constexpr uint32_t kSharedStart = 1024;
constexpr int kThreadsMax = 512;

inline uint32_t cast_smem_ptr_to_uint(const void* at) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(at) - emulator::shared_memory) + kSharedStart;
}

inline uint8_t* at_shared(uint32_t address) {
  if (address < kSharedStart || address >= kSharedStart + emulator::kSharedBytes) emulator::fail("shared memory bounds");
  return emulator::shared_memory + address - kSharedStart;
}

// The 128-byte swizzle: address bits 4 to 6 are xored with bits 7 to 9. The 64-byte swizzle: bits 4 and 5 with 7 and 8.
inline uint32_t swizzle(uint32_t address, int bytes = 128) {
  return address ^ (address >> 7 & (bytes / 16 - 1)) << 4;
}

inline void* dynamic_smem() { return emulator::shared_memory; }

// ---- mbarrier -------------------------------------------------------------------------------------------------------

struct Barrier {
  uint16_t arrivals : 15;
  uint16_t parity : 1;
  int16_t missing;
  int32_t bytes;
};
static_assert(sizeof(Barrier) == 8);

inline Barrier& barrier_of(uint64_t* bar) { return *reinterpret_cast<Barrier*>(bar); }

inline void end_phase(Barrier& bar) {
  if (bar.missing < 0) emulator::fail("more arrivals than a phase has");
  if (bar.missing > 0 || bar.bytes != 0) return;
  bar.parity ^= 1;
  bar.missing = bar.arrivals;
  ++emulator::progress;
}

inline void mbarrier_init(uint64_t* bar, uint32_t arrivals) {
  barrier_of(bar) = {static_cast<uint16_t>(arrivals), 0, static_cast<int16_t>(arrivals), 0};
}

inline void fence_barrier_init() {}

inline void mbarrier_arrive(uint64_t* bar) {
  --barrier_of(bar).missing;
  end_phase(barrier_of(bar));
  if (emulator::random_engine() % 4 == 0) emulator::yield();
}

inline void mbarrier_arrive_and_expect_tx(uint64_t* bar, uint32_t bytes) {
  barrier_of(bar).bytes += bytes;
  --barrier_of(bar).missing;
  end_phase(barrier_of(bar));
}

inline bool mbarrier_try_wait(uint64_t* bar, uint32_t parity) {
  emulator::yield();
  return barrier_of(bar).parity != parity;
}

inline void mbarrier_wait(uint64_t* bar, uint32_t parity) {
  while (!mbarrier_try_wait(bar, parity)) {
  }
}

struct NamedBarrierState {
  int arrived = 0;
  uint64_t syncs = 0;
};

inline NamedBarrierState named_barriers[16];

inline void named_barrier_arrive(int id, int threads) {
  NamedBarrierState& bar = named_barriers[id];
  if (++bar.arrived < threads) return;
  bar = {0, bar.syncs + 1};
  ++emulator::progress;
}

inline void named_barrier_sync(int id, int threads) {
  const uint64_t before = named_barriers[id].syncs;
  named_barrier_arrive(id, threads);
  while (named_barriers[id].syncs == before) emulator::yield();
}

// ---- Without effect on the CPU
// ---------------------------------------------------------------------------------------

inline void launch_dependent_grids() {}
inline void wait_on_dependent_grids() {}
inline void fence_view_async_shared() {}
inline void nanosleep() {}
inline void prefetch_l2(const void*) {}
inline uint4 load_streaming(const uint4* at) { return *at; }
inline void prefetch_tma_descriptor(const CUtensorMap*) {}
inline uint32_t opaque(uint32_t x) { return x; }

template <int N>
void warpgroup_reg_alloc() {}

template <int N>
void warpgroup_reg_dealloc() {}

template <int N>
void warpgroup_fence_operand(float (&)[N]) {}

// ---- Copies ---------------------------------------------------------------------------------------------------------

// What a CUtensorMap holds here; strides in bytes.
struct TensorMap {
  const void* data;
  int64_t dims[5], strides[5];
  uint16_t box[5];
  uint8_t size, swizzle;  // of an element; 64 or 128
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

inline void tma_load(void* target, const CUtensorMap* map, uint64_t* bar, int c0, int c1, int c2, int c3, int c4) {
  TensorMap m;
  std::memcpy(&m, map, sizeof(m));
  const uint32_t base = cast_smem_ptr_to_uint(target);
  emulator::later([=] {
    const int64_t start[5] = {c0, c1, c2, c3, c4};
    const int count = m.box[0] * m.box[1] * m.box[2] * m.box[3] * m.box[4];
    for (int i = 0; i < count; ++i) {
      int64_t offset = 0;
      bool inside = true;
      for (int d = 0, rest = i; d < 5; rest /= m.box[d++]) {
        const int64_t at = start[d] + rest % m.box[d];
        offset += at * m.strides[d];
        inside = inside && at >= 0 && at < m.dims[d];
      }
      uint8_t* const to = at_shared(swizzle(base + i * m.size, m.swizzle));
      if (inside) std::memcpy(to, static_cast<const uint8_t*>(m.data) + offset, m.size);
      else std::memset(to, 0, m.size);
    }
    barrier_of(bar).bytes -= count * m.size;
    end_phase(barrier_of(bar));
  });
}

// Operations of one thread, in groups that are waited for.
struct Queue {
  std::vector<std::function<void()>> open;
  std::vector<std::vector<std::function<void()>>> groups;

  void commit() {
    groups.push_back(std::move(open));
    open.clear();
  }

  void wait(size_t left) {
    for (; groups.size() > left; groups.erase(groups.begin())) {
      for (const auto& run : groups.front()) run();
    }
  }
};

inline Queue copies[kThreadsMax];
inline Queue products[kThreadsMax];

// A new block: nothing is left of a block that failed.
inline void reset_block() {
  for (NamedBarrierState& bar : named_barriers) bar = {};
  for (Queue& queue : copies) queue = {};
  for (Queue& queue : products) queue = {};
  std::memset(emulator::shared_memory, 0xff, emulator::kSharedBytes);
}

inline void cp_async_zfill(uint32_t target, const void* source, uint32_t valid) {
  copies[emulator::current].open.push_back([=] {
    if (valid) std::memcpy(at_shared(target), source, 16);
    else std::memset(at_shared(target), 0, 16);
  });
}

inline void cp_async_mbarrier_arrive_noinc(uint64_t* bar) {
  emulator::later([bar, all = std::move(copies[emulator::current].open)] {
    for (const auto& run : all) run();
    --barrier_of(bar).missing;
    end_phase(barrier_of(bar));
  });
  copies[emulator::current].open.clear();
}

// ---- wgmma ----------------------------------------------------------------------------------------------------------

inline void warpgroup_arrive() { __syncwarp(); }
inline void warpgroup_commit_batch() { products[emulator::current].commit(); }

template <int PENDING>
void warpgroup_wait() {
  __syncwarp();
  products[emulator::current].wait(PENDING);
  __syncwarp();
}

inline uint32_t smem_descriptor_low(const void* tile, uint32_t leading) {
  return (cast_smem_ptr_to_uint(tile) >> 4) | (leading >> 4) << 16;
}

inline uint64_t swizzle128_descriptor(uint32_t low) { return uint64_t{0x40000040u} << 32 | low; }
inline uint64_t swizzle64_descriptor(uint32_t low) { return uint64_t{0x80000020u} << 32 | low; }
inline uint64_t no_swizzle_descriptor(uint32_t low, uint32_t group) { return uint64_t{group >> 4} << 32 | low; }

// Where a tile with a swizzle keeps byte `byte` of 32 of row `row`.
inline uint32_t byte_in(uint64_t descriptor, int row, int byte) {
  const uint32_t start = (descriptor & 0x3fff) << 4;
  const uint32_t group = (descriptor >> 32 & 0x3fff) << 4;
  const int bytes = descriptor >> 62 == 1 ? 128 : 64;
  return swizzle(start + row / 8 * group + row % 8 * bytes + byte, bytes);
}

inline float decode_e4m3(uint8_t bits) {
  const int exponent = bits >> 3 & 15;
  const int fraction = bits & 7;
  float x = exponent == 0 ? std::ldexp(fraction / 8.0f, -6) : std::ldexp(1 + fraction / 8.0f, exponent - 7);
  if ((bits & 0x7f) == 0x7f) x = NAN;
  return bits & 0x80 ? -x : x;
}

// Rounds to nearest even; beyond 448 to 448.
inline uint8_t encode_e4m3(float x) {
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  if (std::isnan(x)) return 0x7f;
  const float size = std::fabs(x);
  if (size >= 448) return sign | 0x7e;
  if (size == 0) return sign;
  int exponent;
  std::frexp(size, &exponent);
  const int unit = std::max(exponent - 1, -6) - 3;  // a step is 2^unit
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, -unit)));
  // steps of 8 to 16 carry into the exponent by themselves
  return sign | static_cast<uint8_t>(steps + (unit + 9) * 8);
}

// Where a tile with 16 contiguous columns of two bytes keeps element (row, k).
inline uint32_t address_in(uint64_t descriptor, int row, int k) {
  const uint32_t start = (descriptor & 0x3fff) << 4;
  const uint32_t leading = (descriptor >> 16 & 0x3fff) << 4;
  const uint32_t group = (descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 == 0) return start + row / 8 * group + row % 8 * 16 + k / 8 * leading + k % 8 * 2;
  return byte_in(descriptor, row, k * 2);
}

template <typename T>
float element(uint16_t bits) {
  T value;
  std::memcpy(&value, &bits, 2);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __bfloat162float(value);
  else return __half2float(value);
}

template <typename T>
float element_at(uint32_t address) {
  uint16_t bits;
  std::memcpy(&bits, at_shared(address), 2);
  return element<T>(bits);
}

// A thread computes its own elements: columns 8 i + 2 (lane % 4) and the next, of rows lane / 4 and lane / 4 + 8 of
// its warp's 16. b(column, k): the address of an element of b.
template <typename T, int N, typename Address>
void multiply(float* d, const float (&a)[2][16], int lane, bool add, Address b) {
  for (int i = 0; i < N / 2; ++i) {
    const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k) sum += a[i / 2 % 2][k] * element_at<T>(b(column, k));
    d[i] = (add ? d[i] : 0) + sum;
  }
}

template <typename T, int N>
struct Wgmma {
  static void ss(float (&d)[N / 2], uint64_t a, uint64_t b, int add) {
    float* const target = d;
    const int lane = emulator::current % 32;
    const int warp = emulator::current % 128 / 32;
    products[emulator::current].open.push_back([=] {
      float rows[2][16];
      for (int i = 0; i < 32; ++i) {
        rows[i / 16][i % 16] = element_at<T>(address_in(a, warp * 16 + lane / 4 + i / 16 * 8, i % 16));
      }
      multiply<T, N>(target, rows, lane, add, [=](int column, int k) { return address_in(b, column, k); });
    });
  }

  // Lane c of four holds columns 2 c and 2 c + 1, and those plus 8, of its two rows.
  static void rs(float (&d)[N / 2], const uint32_t* a, uint64_t b) {
    static const uint32_t* registers[kThreadsMax][32];
    static int issued[kThreadsMax];
    float* const target = d;
    const int thread = emulator::current;
    const int slot = issued[thread]++ % 32;
    registers[thread][slot] = a;
    products[thread].open.push_back([=] {
      float rows[2][16];
      for (int c = 0; c < 4; ++c) {
        const uint32_t* words = registers[thread - thread % 4 + c][slot];
        for (int i = 0; i < 8; ++i) {
          rows[i / 2 % 2][i / 4 * 8 + 2 * c + i % 2] = element<T>(static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2)));
        }
      }
      const uint32_t start = (b & 0x3fff) << 4;
      const uint32_t panel = (b >> 16 & 0x3fff) << 4;
      multiply<T, N>(target, rows, thread % 32, true, [=](int column, int k) {
        return swizzle(start + column / 64 * panel + k / 8 * 1024 + k % 8 * 128 + column % 64 * 2);
      });
    });
  }
};

// m64nNk32 of e4m3 numbers.
template <int N>
struct WgmmaE4m3 {
  static void multiply(float* d, const float (&a)[2][32], int lane, bool add, uint64_t b) {
    for (int i = 0; i < N / 2; ++i) {
      const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float sum = 0;
      for (int k = 0; k < 32; ++k) sum += a[i / 2 % 2][k] * decode_e4m3(*at_shared(byte_in(b, column, k)));
      d[i] = (add ? d[i] : 0) + sum;
    }
  }

  static void ss(float (&d)[N / 2], uint64_t a, uint64_t b, int add) {
    float* const target = d;
    const int lane = emulator::current % 32;
    const int warp = emulator::current % 128 / 32;
    products[emulator::current].open.push_back([=] {
      float rows[2][32];
      for (int i = 0; i < 64; ++i) {
        rows[i / 32][i % 32] = decode_e4m3(*at_shared(byte_in(a, warp * 16 + lane / 4 + i / 32 * 8, i % 32)));
      }
      multiply(target, rows, lane, add, b);
    });
  }

  // Lane c of four holds columns 4 c to 4 c + 3, and those plus 16, of its two rows.
  static void rs(float (&d)[N / 2], const uint32_t* a, uint64_t b) {
    static const uint32_t* registers[kThreadsMax][32];
    static int issued[kThreadsMax];
    float* const target = d;
    const int thread = emulator::current;
    const int slot = issued[thread]++ % 32;
    registers[thread][slot] = a;
    products[thread].open.push_back([=] {
      float rows[2][32];
      for (int c = 0; c < 4; ++c) {
        const uint32_t* words = registers[thread - thread % 4 + c][slot];
        for (int i = 0; i < 16; ++i) {
          rows[i / 4 % 2][i / 8 * 16 + 4 * c + i % 4] = decode_e4m3(words[i / 4] >> i % 4 * 8 & 0xff);
        }
      }
      multiply(target, rows, thread % 32, true, b);
    });
  }
};

// ---- Arithmetic -----------------------------------------------------------------------------------------------------

inline int max3(int x, int y, int z) { return std::max(std::max(x, y), z); }

inline float add_rounded_up(float x, float y) {
  const double sum = static_cast<double>(x) + y;
  const float rounded = static_cast<float>(sum);
  return rounded < sum ? std::nextafter(rounded, INFINITY) : rounded;
}

inline uint32_t pack_e4m3(float x0, float x1, float x2, float x3) {
  return encode_e4m3(x0) | encode_e4m3(x1) << 8 | encode_e4m3(x2) << 16 | uint32_t{encode_e4m3(x3)} << 24;
}

inline float exp2_approx(float x) { return x < -126 ? 0 : std::exp2(x); }

template <typename T>
uint32_t pack(float low, float high) {
  T halves[2];
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    halves[0] = __float2bfloat16(low);
    halves[1] = __float2bfloat16(high);
  } else {
    halves[0] = __float2half(low);
    halves[1] = __float2half(high);
  }
  uint32_t word;
  std::memcpy(&word, halves, 4);
  return word;
}

}  // namespace specedit::sm90
