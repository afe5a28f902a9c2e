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

// The same of e4m3 numbers with scales, padded layout, D 128, q and k on the 16-byte grid; out is bf16. For what the
// Python dispatch lets through. q_scale, k_scale, v_scale: fp32 [B, rows or 1, heads].
//
// v is read as it is where its rows are contiguous and lie on the 16-byte grid, k has a multiple of 4 rows and there is
// no kv_index. Else the workspace has k, v transposed, biases and scales of each slot: about 2 B Nk Hk D bytes.
torch::stable::Tensor mixed_res_attn_fp8(
    torch::stable::Tensor out, const torch::stable::Tensor& q, const torch::stable::Tensor& k,
    const torch::stable::Tensor& v, const torch::stable::Tensor& q_scale, const torch::stable::Tensor& k_scale,
    const torch::stable::Tensor& v_scale, std::optional<torch::stable::Tensor> key_bias,
    std::optional<torch::stable::Tensor> q_index, std::optional<torch::stable::Tensor> kv_index,
    std::optional<torch::stable::Tensor> q_lens, std::optional<torch::stable::Tensor> kv_lens, double scale);

}  // namespace specedit
