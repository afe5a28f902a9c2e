// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace specedit {

// out: [B, rows, H, D], or packed [Tq, H, D], written in place; returns lse, fp32 [B, H, Nq] or [H, Tq]. For what the
// Python dispatch lets through: bf16 or fp16, D 64 or 128, 16-byte aligned rows, scale > 0, at most 512 batch entries.
//
// Workspace: the fp32 results of splits, at most 263 work tiles on 132 SMs, 18 MB at D = 128. By kv_index, where many
// work tiles use a row of k (kPregatherMinTiles), also k, v and bias of its slots: 4 B Nk (Hk D + 1) bytes.
torch::stable::Tensor mixed_res_attn(
    torch::stable::Tensor out, std::optional<torch::stable::Tensor> out_index, const torch::stable::Tensor& q,
    const torch::stable::Tensor& k, const torch::stable::Tensor& v, std::optional<torch::stable::Tensor> key_bias,
    std::optional<torch::stable::Tensor> q_index, std::optional<torch::stable::Tensor> kv_index,
    std::optional<torch::stable::Tensor> q_lens, std::optional<torch::stable::Tensor> kv_lens,
    std::optional<torch::stable::Tensor> cu_seqlens_q, std::optional<torch::stable::Tensor> cu_seqlens_k,
    std::optional<int64_t> max_seqlen_q, std::optional<int64_t> max_seqlen_k, double scale);

}  // namespace specedit
