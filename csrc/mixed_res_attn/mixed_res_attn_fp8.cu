// SPDX-License-Identifier: Apache-2.0
// Host side of the attention of e4m3 numbers on sm_90a. No synchronisation: lengths stay on the device.
#include "mixed_res_attn/host.h"
#include "mixed_res_attn/mixed_res_attn.h"
#include "mixed_res_attn/pack_kv_fp8.cuh"

namespace specedit {
namespace {

using attn::Option;
using attn::Params;
using attn::Strides;
using attn::View;
using attn::view_of;

constexpr int kDim = attn::kPackDim;
constexpr CUtensorMapDataType kByte = CU_TENSOR_MAP_DATA_TYPE_UINT8;

cuuint64_t tma_stride(int64_t stride) { return static_cast<cuuint64_t>(stride == 0 ? 16 : stride); }

// Of a scale [B, rows or 1, heads].
Strides scale_strides_of(const Tensor& x) {
  const auto stride = [&](int64_t i) { return x.size(i) == 1 ? int64_t{0} : x.stride(i); };
  return {stride(0), stride(1), stride(2)};
}

// Of v [B, panels, Hk, D, kValuePanel]: its rows are the panels.
View view_of_panels(const Tensor& v) {
  const auto stride = [&](int64_t i) { return v.size(i) == 1 ? int64_t{0} : v.stride(i); };
  return {v.data_ptr(), {stride(0), stride(1), stride(2)}, v.size(0), v.size(1), v.size(2), v.size(3)};
}

// Boxes of K: rows 4 i and 4 i + 1, or 4 i + 2 and 4 i + 3, of kBlockNFp8 rows (see key_of_row).
CUtensorMap k_descriptor(const View& k) {
  return attn::tma_descriptor(
      kByte, k.data,
      {kDim, 4, static_cast<cuuint64_t>(k.rows / 4), static_cast<cuuint64_t>(k.heads),
       static_cast<cuuint64_t>(k.batch)},
      {tma_stride(k.strides.row), tma_stride(4 * k.strides.row), tma_stride(k.strides.head),
       tma_stride(k.strides.batch)},
      {kDim, 2, attn::kBlockNFp8 / 4, 1, 1}, CU_TENSOR_MAP_SWIZZLE_128B);
}

// Boxes of V: the panels of kBlockNFp8 keys.
CUtensorMap v_descriptor(const View& v, int64_t column_stride) {
  return attn::tma_descriptor(
      kByte, v.data,
      {attn::kValuePanel, kDim, static_cast<cuuint64_t>(v.rows), static_cast<cuuint64_t>(v.heads),
       static_cast<cuuint64_t>(v.batch)},
      {tma_stride(column_stride), tma_stride(v.strides.row), tma_stride(v.strides.head), tma_stride(v.strides.batch)},
      {attn::kValuePanel, kDim, attn::kBlockNFp8 / attn::kValuePanel, 1, 1}, CU_TENSOR_MAP_SWIZZLE_64B);
}

// Brings the slots of k and v, their biases and scales to the returned workspace. Afterwards p and the views describe a
// call that loads these. panels: whether v is in panels.
Tensor pack_kv(
    Params& p, View& k, View& v, bool panels, int64_t& v_column_stride, const Tensor& q, cudaStream_t stream) {
  const int64_t slots = p.max_seqlen_k;
  const int num_panels = attn::ceil_div(p.max_seqlen_k, attn::kPackKeys);
  const int64_t padded = int64_t{num_panels} * attn::kPackKeys;
  const int64_t numbers = k.batch * padded * k.heads * kDim;
  const bool k_by_row = p.k_scale_strides.row != 0, v_by_row = p.v_scale_strides.row != 0;
  const bool has_bias = p.bias != nullptr || p.kv_index != nullptr;
  const int64_t floats = k.batch * slots * (has_bias + k.heads * (int64_t{k_by_row} + v_by_row));
  Tensor workspace = empty_on(q, {2 * numbers / 4 + floats}, ScalarType::Float);
  attn::PackParams r{};
  r.k = static_cast<const uint8_t*>(k.data);
  r.v = static_cast<const uint8_t*>(v.data);
  r.k_strides = k.strides;
  r.v_strides = v.strides;
  r.v_column_stride = v_column_stride;
  r.bias = p.bias;
  r.k_scale = p.k_scale;
  r.v_scale = p.v_scale;
  r.k_scale_strides = p.k_scale_strides;
  r.v_scale_strides = p.v_scale_strides;
  r.index = p.kv_index;
  r.lens = p.kv_lens;
  r.bias_batch_stride = p.bias_batch_stride;
  r.index_batch_stride = p.kv_index_batch_stride;
  r.k_out = static_cast<uint8_t*>(workspace.data_ptr());
  r.v_out = r.k_out + numbers;
  float* next = reinterpret_cast<float*>(r.v_out + numbers);
  const auto take = [&](bool wanted, int64_t count) {
    float* const taken = wanted ? next : nullptr;
    if (wanted) next += count;
    return taken;
  };
  r.bias_out = take(has_bias, k.batch * slots);
  r.k_scale_out = take(k_by_row, k.batch * slots * k.heads);
  r.v_scale_out = take(v_by_row, k.batch * slots * k.heads);
  r.slots = p.max_seqlen_k;
  r.rows = p.rows_k;
  const dim3 grid(num_panels, static_cast<unsigned>(k.heads), static_cast<unsigned>(k.batch));
  if (grid.x > 0) {
    (panels ? attn::pack_kv_kernel<true> : attn::pack_kv_kernel<false>)<<<grid, attn::kPackThreads,
                                                                         attn::kPackSmemBytes, stream>>>(r);
    check_cuda(cudaGetLastError(), "mixed_res_attn_fp8");
  }
  const int64_t row = k.heads * kDim;
  k = View{r.k_out, {padded * row, row, kDim}, k.batch, padded, k.heads, kDim};
  constexpr int64_t kPanelBytes = int64_t{attn::kPackKeys} * kDim;
  v = View{r.v_out, {padded * row, k.heads * kPanelBytes, kPanelBytes}, k.batch, num_panels, k.heads, kDim};
  v_column_stride = attn::kPackKeys;
  p.rows_k = attn::checked_int(padded, "slots of keys");
  if (has_bias) {
    p.bias = r.bias_out;
    p.bias_batch_stride = slots;
  }
  const Strides of_slots{slots * k.heads, 1, slots};
  if (k_by_row) {
    p.k_scale = r.k_scale_out;
    p.k_scale_strides = of_slots;
  }
  if (v_by_row) {
    p.v_scale = r.v_scale_out;
    p.v_scale_strides = of_slots;
  }
  p.kv_index = nullptr;
  return workspace;
}

}  // namespace

Tensor mixed_res_attn_fp8(
    Tensor out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_scale, const Tensor& k_scale,
    const Tensor& v_scale, Option key_bias, Option q_index, Option kv_index, Option q_lens, Option kv_lens,
    double scale) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const View qv = view_of(q), ov = view_of(out);
  const bool panels = v.dim() == 5;
  View kv = view_of(k), vv = panels ? view_of_panels(v) : view_of(v);
  if (qv.dim != kDim) throw std::invalid_argument("mixed_res_attn_fp8: q: expected D 128");
  if (qv.batch > attn::kMaxBatch) {
    throw std::invalid_argument("mixed_res_attn_fp8: q: expected at most 512 batch entries");
  }
  const int64_t num_q = q_index.has_value() ? q_index->size(1) : qv.rows;
  const int64_t num_k = kv_index.has_value() ? kv_index->size(1) : kv.rows;
  Tensor lse = empty_on(q, {qv.batch, qv.heads, num_q}, ScalarType::Float);
  if (lse.numel() == 0) return lse;
  Params p{};
  attn::set_operands(p, qv, kv, vv, ov, key_bias, q_index, kv_index, q_lens, kv_lens, qv.batch, num_q, num_k);
  p.lse = static_cast<float*>(lse.data_ptr());
  p.set_scale(scale, false);
  p.q_scale = static_cast<const float*>(q_scale.data_ptr());
  p.k_scale = static_cast<const float*>(k_scale.data_ptr());
  p.v_scale = static_cast<const float*>(v_scale.data_ptr());
  p.q_scale_strides = scale_strides_of(q_scale);
  p.k_scale_strides = scale_strides_of(k_scale);
  p.v_scale_strides = scale_strides_of(v_scale);
  const bool by_row = p.k_scale_strides.row != 0 || p.v_scale_strides.row != 0;
  const cudaStream_t stream = current_stream(q);
  int64_t v_column_stride = v.stride(3);
  std::optional<Tensor> packed;
  if (p.kv_index != nullptr || !panels || kv.rows % 4 != 0) {
    packed = pack_kv(p, kv, vv, panels, v_column_stride, q, stream);
  }
  // A TMA descriptor has no empty dimension. Without queries or keys there is no load.
  if (qv.rows > 0) p.tma_q = attn::tma_descriptor_of_rows(qv, kByte, 1, attn::kWarpgroupRows);
  if (kv.rows > 0) {
    p.tma_k = k_descriptor(kv);
    p.tma_v = v_descriptor(vv, v_column_stride);
  }
  const int num_ctas = attn::num_ctas_on(q);
  const std::optional<Tensor> workspace =
      attn::plan_and_workspace(p, q, kDim, attn::kTileOfFp8, num_ctas);
  (by_row ? attn::launch<E4m3ByRow, kDim, false> : attn::launch<E4m3, kDim, false>)(p, num_ctas, stream);
  return lse;
}

}  // namespace specedit
