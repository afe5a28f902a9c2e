// SPDX-License-Identifier: Apache-2.0
// Stands for CUDA's header of this name: what the kernels of mixed_res_attn use of it.
#pragma once

#include <cstdint>
#include <cstring>

#define __host__
#define __device__
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

using cudaStream_t = void*;

struct alignas(8) uint2 {
  uint32_t x, y;
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct alignas(16) int4 {
  int32_t x, y, z, w;
};

struct alignas(8) float2 {
  float x, y;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// Bytes of x and y by number: 0 to 3 are of x, 4 to 7 of y.
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t numbers) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  uint32_t picked = 0;
  for (int i = 0; i < 4; ++i) picked |= static_cast<uint32_t>(bytes >> 8 * (numbers >> 4 * i & 7) & 0xff) << 8 * i;
  return picked;
}
