// SPDX-License-Identifier: Apache-2.0
// Host side of the attention on sm_90a: TMA descriptors, plan, workspace, launch. No synchronisation: lengths stay on
// the device.
#include "mixed_res_attn/mixed_res_attn.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "mixed_res_attn/gather_kv.cuh"
#include "mixed_res_attn/host.h"

namespace specedit {
namespace {

using attn::batch_stride;
using attn::checked_int;
using attn::int_data;
using attn::Option;
using attn::Params;
using attn::Strides;
using attn::View;
using attn::view_of;

template <typename T>
void launch(const Params& p, int64_t dim, int num_ctas, cudaStream_t stream) {
  const bool gather = p.kv_index != nullptr;
  if (dim == 64) {
    (gather ? attn::launch<T, 64, true> : attn::launch<T, 64, false>)(p, num_ctas, stream);
  } else {
    (gather ? attn::launch<T, 128, true> : attn::launch<T, 128, false>)(p, num_ctas, stream);
  }
}

// Whether rows by kv_index are gathered before the attention. The attention itself gathers them for each work tile,
// which takes issue slots; and its strides, in bytes, have 32 bits.
bool gathers_first(const View& q, const View& k, const View& v, int64_t num_q) {
  const int64_t block_m = attn::tile_of(q.dim, true).block_m();
  const int64_t tiles_of_row = q.heads / k.heads * ((num_q + block_m - 1) / block_m);
  return tiles_of_row >= attn::kPregatherMinTiles || std::max(k.strides.row, v.strides.row) > INT_MAX / 2;
}

// Gathers k, v and bias of all slots of kv_index into the returned workspace. Afterwards p and the views describe a
// call without kv_index.
Tensor gather_kv(Params& p, View& k, View& v, const Tensor& q, cudaStream_t stream) {
  const int64_t row = k.heads * k.dim;
  const int64_t slots = k.batch * p.max_seqlen_k;
  Tensor workspace = empty_on(q, {slots * (row + 1)}, ScalarType::Float);
  uint4* const out = static_cast<uint4*>(workspace.data_ptr());
  attn::GatherParams r{};
  const auto in_words = [](const Strides& x) { return Strides{x.batch / 8, x.row / 8, x.head / 8}; };
  r.k = static_cast<const uint4*>(p.k);
  r.v = static_cast<const uint4*>(p.v);
  r.k_strides = in_words(p.k_strides);
  r.v_strides = in_words(p.v_strides);
  r.bias = p.bias;
  r.index = p.kv_index;
  r.lens = p.kv_lens;
  r.bias_batch_stride = p.bias_batch_stride;
  r.index_batch_stride = p.kv_index_batch_stride;
  r.words = checked_int(row / 8, "a row of k");
  r.head_shift = k.dim == 64 ? 3 : 4;
  r.k_out = out;
  r.v_out = out + slots * r.words;
  r.bias_out = reinterpret_cast<float*>(out + 2 * slots * r.words);
  r.batch = p.batch;
  r.slots = p.max_seqlen_k;
  r.rows = p.rows_k;
  const int num_ctas = attn::ceil_div(checked_int(slots, "slots of kv_index"), attn::kGatherThreads / 32);
  if (num_ctas > 0) attn::gather_kv_kernel<<<num_ctas, attn::kGatherThreads, 0, stream>>>(r);
  check_cuda(cudaGetLastError(), "mixed_res_attn");
  const Strides dense{p.max_seqlen_k * row, row, k.dim};
  k = View{r.k_out, dense, k.batch, p.max_seqlen_k, k.heads, k.dim};
  v = View{r.v_out, dense, k.batch, p.max_seqlen_k, k.heads, k.dim};
  p.k = r.k_out;
  p.v = r.v_out;
  p.k_strides = p.v_strides = dense;
  p.bias = r.bias_out;
  p.bias_batch_stride = p.max_seqlen_k;
  p.kv_index = nullptr;
  p.rows_k = p.max_seqlen_k;
  return workspace;
}

}  // namespace

Tensor mixed_res_attn(
    Tensor out, Option out_index, const Tensor& q, const Tensor& k, const Tensor& v, Option key_bias, Option q_index,
    Option kv_index, Option q_lens, Option kv_lens, Option cu_seqlens_q, Option cu_seqlens_k,
    std::optional<int64_t> max_seqlen_q, std::optional<int64_t> max_seqlen_k, double scale) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const bool packed = cu_seqlens_q.has_value();
  const View qv = view_of(q), ov = view_of(out);
  View kv = view_of(k), vv = view_of(v);
  const ScalarType dtype = q.scalar_type();
  if ((dtype != ScalarType::BFloat16 && dtype != ScalarType::Half) || (qv.dim != 64 && qv.dim != 128)) {
    throw std::invalid_argument("mixed_res_attn: q: expected bf16 or fp16 with D 64 or 128");
  }
  const int64_t num_q = packed ? max_seqlen_q.value() : q_index.has_value() ? q_index->size(1) : qv.rows;
  const int64_t num_k = packed ? max_seqlen_k.value() : kv_index.has_value() ? kv_index->size(1) : kv.rows;
  const int64_t batch = packed ? cu_seqlens_q->size(0) - 1 : qv.batch;
  Tensor lse = packed ? empty_on(q, {qv.heads, qv.rows}, ScalarType::Float)
                      : empty_on(q, {batch, qv.heads, num_q}, ScalarType::Float);
  if (lse.numel() == 0) return lse;
  if (batch > attn::kMaxBatch) throw std::invalid_argument("mixed_res_attn: q: expected at most 512 batch entries");

  Params p{};
  attn::set_operands(
      p, qv, kv, vv, ov, key_bias, q_index, kv_index, q_lens, kv_lens, batch, num_q, num_k);
  p.out_index = int_data(out_index);
  p.out_index_batch_stride = batch_stride(out_index);
  p.cu_seqlens_q = int_data(cu_seqlens_q);
  p.cu_seqlens_k = int_data(cu_seqlens_k);
  if (packed) {
    p.lse_batch_stride = 0;
    p.lse_head_stride = qv.rows;
  }
  p.lse = static_cast<float*>(lse.data_ptr());
  p.set_scale(scale, dtype == ScalarType::Half);
  const cudaStream_t stream = current_stream(q);
  std::optional<Tensor> gathered;
  if (p.kv_index != nullptr && gathers_first(qv, kv, vv, num_q)) gathered = gather_kv(p, kv, vv, q, stream);
  const attn::TileShape tile = attn::tile_of(qv.dim, p.kv_index != nullptr);
  if (p.kv_index == nullptr) {
    // A TMA descriptor has no empty dimension. Without queries or keys there is no load.
    const CUtensorMapDataType type =
        dtype == ScalarType::BFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    if (qv.rows > 0) p.tma_q = attn::tma_descriptor_of_rows(qv, type, 2, attn::kWarpgroupRows);
    if (kv.rows > 0) {
      p.tma_k = attn::tma_descriptor_of_rows(kv, type, 2, tile.block_n);
      p.tma_v = attn::tma_descriptor_of_rows(vv, type, 2, tile.block_n);
    }
  }

  const int num_ctas = attn::num_ctas_on(q);
  const std::optional<Tensor> workspace =
      attn::plan_and_workspace(p, q, qv.dim, tile, num_ctas);
  if (dtype == ScalarType::BFloat16) launch<__nv_bfloat16>(p, qv.dim, num_ctas, stream);
  else launch<__half>(p, qv.dim, num_ctas, stream);
  return lse;
}

}  // namespace specedit
