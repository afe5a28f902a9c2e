// SPDX-License-Identifier: Apache-2.0
// Stands for CUDA's header of this name: bf16 with round to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;

  __nv_bfloat16() = default;

  explicit __nv_bfloat16(float x) {
    uint32_t word;
    std::memcpy(&word, &x, 4);
    const bool nan = (word & 0x7fffffffu) > 0x7f800000u;
    bits = static_cast<uint16_t>(nan ? 0x7fffu : (word + 0x7fffu + (word >> 16 & 1)) >> 16);
  }

  explicit operator float() const {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &word, 4);
    return x;
  }
};

inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
inline float __bfloat162float(__nv_bfloat16 x) { return static_cast<float>(x); }
