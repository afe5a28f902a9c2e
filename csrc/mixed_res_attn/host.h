// SPDX-License-Identifier: Apache-2.0
// What both attention ops do on the host: views of tensors, TMA descriptors, arguments, plan and workspace.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <climits>
#include <optional>

#include "common.h"
#include "mixed_res_attn/params.h"

namespace specedit::attn {

using Option = std::optional<Tensor>;

// A tensor [B, S, H, D], or [T, H, D] as one batch entry. The stride of a dimension of size 1 counts as 0.
struct View {
  void* data;
  Strides strides;
  int64_t batch, rows, heads, dim;
};

inline View view_of(const Tensor& x) {
  const int64_t d = x.dim();
  const auto stride = [&](int64_t i) { return x.size(i) == 1 ? int64_t{0} : x.stride(i); };
  View view{x.data_ptr(), {d == 4 ? stride(0) : 0, stride(d - 3), stride(d - 2)}, d == 4 ? x.size(0) : 1,
            x.size(d - 3), x.size(d - 2), x.size(d - 1)};
  return view;
}

inline decltype(&cuTensorMapEncodeTiled) tensor_map_encode() {
  static const auto function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    check_cuda(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
        "cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(result == cudaDriverEntryPointSuccess ? found : nullptr);
  }();
  if (function == nullptr) throw std::runtime_error("mixed_res_attn: this driver has no cuTensorMapEncodeTiled");
  return function;
}

// Boxes of a tensor; elements outside it are zeros. strides: of all dimensions but the first, in bytes.
inline CUtensorMap tma_descriptor(
    CUtensorMapDataType type, void* data, const cuuint64_t (&dims)[5], const cuuint64_t (&strides)[4],
    const cuuint32_t (&box)[5], CUtensorMapSwizzle swizzle) {
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result = tensor_map_encode()(
      &map, type, 5, data, dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("mixed_res_attn: cuTensorMapEncodeTiled: error " + std::to_string(result));
  }
  return map;
}

// Boxes of `rows` rows of one head, in panels of 128 bytes of a row with the 128-byte swizzle. size: of an element.
inline CUtensorMap tma_descriptor_of_rows(const View& x, CUtensorMapDataType type, int size, int rows) {
  const auto bytes = [&](int64_t stride) { return static_cast<cuuint64_t>(stride == 0 ? 16 : stride * size); };
  const cuuint64_t panel = 128 / size;
  const cuuint64_t panels = static_cast<cuuint64_t>(x.dim) / panel;
  return tma_descriptor(
      type, x.data,
      {panel, static_cast<cuuint64_t>(x.rows), panels, static_cast<cuuint64_t>(x.heads),
       static_cast<cuuint64_t>(x.batch)},
      {bytes(x.strides.row), 128, bytes(x.strides.head), bytes(x.strides.batch)},
      {static_cast<cuuint32_t>(panel), static_cast<cuuint32_t>(rows), static_cast<cuuint32_t>(panels), 1, 1},
      CU_TENSOR_MAP_SWIZZLE_128B);
}

inline const int* int_data(const Option& x) { return x.has_value() ? static_cast<const int*>(x->data_ptr()) : nullptr; }
inline int64_t batch_stride(const Option& x) { return x.has_value() && x->dim() > 1 && x->size(0) > 1 ? x->stride(0) : 0; }

inline int checked_int(int64_t x, const char* what) {
  if (x < 0 || x > INT_MAX - 1024) {
    throw std::invalid_argument(
        std::string("mixed_res_attn: ") + what + ": expected at most 2**31 - 1025, got " + std::to_string(x));
  }
  return static_cast<int>(x);
}

// Arguments of the padded layout; those of the packed one are left as they are. num_q, num_k: slots.
inline void set_operands(
    Params& p, const View& q, const View& k, const View& v, const View& out, const Option& key_bias,
    const Option& q_index, const Option& kv_index, const Option& q_lens, const Option& kv_lens, int64_t batch,
    int64_t num_q, int64_t num_k) {
  p.q = q.data;
  p.k = k.data;
  p.v = v.data;
  p.q_strides = q.strides;
  p.k_strides = k.strides;
  p.v_strides = v.strides;
  p.out_strides = out.strides;
  p.bias = key_bias.has_value() ? static_cast<const float*>(key_bias->data_ptr()) : nullptr;
  p.q_index = int_data(q_index);
  p.kv_index = int_data(kv_index);
  p.q_lens = int_data(q_lens);
  p.kv_lens = int_data(kv_lens);
  p.bias_batch_stride = batch_stride(key_bias);
  p.q_index_batch_stride = batch_stride(q_index);
  p.kv_index_batch_stride = batch_stride(kv_index);
  p.lse_batch_stride = q.heads * num_q;
  p.lse_head_stride = num_q;
  p.out = out.data;
  p.batch = checked_int(batch, "batch");
  p.heads = checked_int(q.heads, "heads");
  p.qhead_per_khead = p.heads / checked_int(k.heads, "heads of k");
  p.max_seqlen_q = checked_int(num_q, "queries");
  p.max_seqlen_k = checked_int(num_k, "keys");
  p.rows_q = checked_int(q.rows, "rows of q");
  p.rows_k = checked_int(k.rows, "rows of k");
  p.rows_out = checked_int(out.rows, "rows of out");
}

// One CTA an SM.
inline int num_ctas_on(const Tensor& q) {
  int num_ctas = 0;
  check_cuda(
      cudaDeviceGetAttribute(&num_ctas, cudaDevAttrMultiProcessorCount, q.get_device_index()), "mixed_res_attn");
  return num_ctas;
}

// Makes the plan where no length is on the device. Returns memory for the splits of the last partial wave, if any.
inline std::optional<Tensor> plan_and_workspace(
    Params& p, const Tensor& q, int64_t dim, TileShape tile, int num_ctas) {
  const int num_tiles =
      checked_int(int64_t{p.batch} * p.heads * ceil_div(p.max_seqlen_q, tile.block_m()), "work tiles");
  if (p.q_lens == nullptr && p.kv_lens == nullptr && p.cu_seqlens_q == nullptr) {
    plan_on_host(p.plan, p.max_seqlen_q, p.max_seqlen_k, num_tiles, num_ctas, tile);
    p.max_split_tiles = p.plan.partial_wave_tiles;
  } else {
    p.max_split_tiles = std::min(num_tiles, num_ctas - 1);
  }
  if (p.max_split_tiles <= 0) return std::nullopt;
  const int64_t rows = (int64_t{p.max_split_tiles} + num_ctas) * tile.block_m();
  const int64_t split_tiles = p.plan.planned ? 0 : p.max_split_tiles;
  const int64_t floats = rows * (dim + 2) + split_tiles * int64_t{sizeof(SplitTile) / sizeof(float)};
  Tensor workspace = empty_on(q, {floats}, ScalarType::Float);
  p.out_partial = static_cast<float*>(workspace.data_ptr());
  p.max_sum_partial = reinterpret_cast<float2*>(p.out_partial + rows * dim);
  p.split_tiles = reinterpret_cast<SplitTile*>(p.max_sum_partial + rows);
  return workspace;
}

}  // namespace specedit::attn
