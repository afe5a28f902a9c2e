// SPDX-License-Identifier: Apache-2.0
// Stands for CUDA's header of this name: fp16 with round to nearest even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;

  __half() = default;

  explicit __half(float x) {
    uint32_t word;
    std::memcpy(&word, &x, 4);
    const uint32_t magnitude = word & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
      half = 0x7fff;  // NaN
    } else if (magnitude >= 0x477ff000u) {
      half = 0x7c00;  // 65520 and more round to infinity
    } else if (magnitude < 0x38800000u) {
      half = static_cast<uint32_t>(std::nearbyint(std::fabs(x) * 0x1p24f));  // subnormal: multiples of 2^-24
    } else {
      half = (magnitude + 0xfffu + (magnitude >> 13 & 1) - 0x38000000u) >> 13;
    }
    bits = static_cast<uint16_t>(word >> 16 & 0x8000u | half);
  }

  explicit operator float() const {
    const uint32_t exponent = bits >> 10 & 31;
    const uint32_t fraction = bits & 0x3ff;
    float x;
    if (exponent == 0) {
      x = static_cast<float>(fraction) * 0x1p-24f;
    } else {
      const uint32_t word = (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
      std::memcpy(&x, &word, 4);
    }
    return bits & 0x8000 ? -x : x;
  }
};

inline __half __float2half(float x) { return __half(x); }
inline float __half2float(__half x) { return static_cast<float>(x); }
