// SPDX-License-Identifier: Apache-2.0
// Stands for CUDA's header of this name, so that the emulation compiles without CUDA.
#pragma once

struct alignas(64) CUtensorMap {
  unsigned long long opaque[16];
};
