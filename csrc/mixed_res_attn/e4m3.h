// SPDX-License-Identifier: Apache-2.0
// The element types of fp8 attention. Plain C++: kernels, host and the CPU emulation use it.
#pragma once

#include <cstdint>
#include <type_traits>

namespace specedit {

// An e4m3 number. As the element type of a kernel it also says where the scales of k and v come from: one a head, or
// one a row and head.
struct E4m3 {
  uint8_t bits;
};
struct E4m3ByRow {
  uint8_t bits;
};

template <typename T>
constexpr bool kIsFp8 = sizeof(T) == 1;
template <typename T>
constexpr bool kByRow = std::is_same_v<T, E4m3ByRow>;

}  // namespace specedit
