// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common.h"

namespace specedit {

// draft, source: [B, C, H, W] or [B, N, C], bf16, fp16 or fp32, any strides, checked by the caller.
// Returns fp32 [B, grid_h * grid_w]: the mean over each cell's pixels of ||d^ - s^||^2 over the channels.
Tensor token_discrepancy(const Tensor& draft, const Tensor& source, int64_t grid_h, int64_t grid_w);

}  // namespace specedit
