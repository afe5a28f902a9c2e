// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <tuple>

#include "common.h"

namespace specedit {

// score: [B, grid_h * grid_w], bf16, fp16 or fp32, last dimension contiguous, checked by the caller.
// Returns mask (bool [B, N]), index (int32 [B, N]: selected tokens, then the others), count (int32 [B]).
std::tuple<Tensor, Tensor, Tensor> select_tokens(
    const Tensor& score, int64_t grid_h, int64_t grid_w, double threshold, int64_t dilation, int64_t uniform_stride);

}  // namespace specedit
