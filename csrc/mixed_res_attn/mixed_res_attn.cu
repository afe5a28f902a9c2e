// SPDX-License-Identifier: Apache-2.0
// Host side of the attention on sm_90a: TMA descriptors, plan, workspace, launch. No synchronisation: lengths stay on
// the device.
#include "mixed_res_attn/mixed_res_attn.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <climits>

#include "common.h"
#include "mixed_res_attn/gather_kv.cuh"
#include "mixed_res_attn/params.h"

namespace specedit {
namespace {

using attn::Params;
using attn::Strides;
using Option = std::optional<Tensor>;

// A tensor [B, S, H, D], or [T, H, D] as one batch entry. The stride of a dimension of size 1 counts as 0.
struct View {
  void* data;
  Strides strides;
  int64_t batch, rows, heads, dim;
};

View view_of(const Tensor& x) {
  const int64_t d = x.dim();
  const auto stride = [&](int64_t i) { return x.size(i) == 1 ? int64_t{0} : x.stride(i); };
  View view{x.data_ptr(), {d == 4 ? stride(0) : 0, stride(d - 3), stride(d - 2)}, d == 4 ? x.size(0) : 1,
            x.size(d - 3), x.size(d - 2), x.size(d - 1)};
  return view;
}

decltype(&cuTensorMapEncodeTiled) tensor_map_encode() {
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

// Boxes of `rows` rows of one head, in panels of 64 columns with the 128-byte swizzle. Rows outside are zeros.
CUtensorMap tma_descriptor_of(const View& x, ScalarType dtype, int rows) {
  constexpr int64_t kSize = 2;
  const auto bytes = [](int64_t stride) { return static_cast<cuuint64_t>(stride == 0 ? 16 : stride * kSize); };
  const cuuint64_t dims[5] = {64, static_cast<cuuint64_t>(x.rows), static_cast<cuuint64_t>(x.dim / 64),
                              static_cast<cuuint64_t>(x.heads), static_cast<cuuint64_t>(x.batch)};
  const cuuint64_t strides[4] = {bytes(x.strides.row), 128, bytes(x.strides.head), bytes(x.strides.batch)};
  const cuuint32_t box[5] = {64, static_cast<cuuint32_t>(rows), static_cast<cuuint32_t>(x.dim / 64), 1, 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result = tensor_map_encode()(
      &map, dtype == ScalarType::BFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 5,
      x.data, dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("mixed_res_attn: cuTensorMapEncodeTiled: error " + std::to_string(result));
  }
  return map;
}

const int* int_data(const Option& x) { return x.has_value() ? static_cast<const int*>(x->data_ptr()) : nullptr; }
int64_t batch_stride(const Option& x) { return x.has_value() && x->dim() > 1 && x->size(0) > 1 ? x->stride(0) : 0; }

int checked_int(int64_t x, const char* what) {
  if (x < 0 || x > INT_MAX - 1024) {
    throw std::invalid_argument(
        std::string("mixed_res_attn: ") + what + ": expected at most 2**31 - 1025, got " + std::to_string(x));
  }
  return static_cast<int>(x);
}

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
  const int64_t tiles_of_row = q.heads / k.heads * ((num_q + attn::kBlockM - 1) / attn::kBlockM);
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
  p.q = qv.data;
  p.k = kv.data;
  p.v = vv.data;
  p.q_strides = qv.strides;
  p.k_strides = kv.strides;
  p.v_strides = vv.strides;
  p.out_strides = ov.strides;
  p.bias = key_bias.has_value() ? static_cast<const float*>(key_bias->data_ptr()) : nullptr;
  p.q_index = int_data(q_index);
  p.kv_index = int_data(kv_index);
  p.out_index = int_data(out_index);
  p.q_lens = int_data(q_lens);
  p.kv_lens = int_data(kv_lens);
  p.cu_seqlens_q = int_data(cu_seqlens_q);
  p.cu_seqlens_k = int_data(cu_seqlens_k);
  p.bias_batch_stride = batch_stride(key_bias);
  p.q_index_batch_stride = batch_stride(q_index);
  p.kv_index_batch_stride = batch_stride(kv_index);
  p.out_index_batch_stride = batch_stride(out_index);
  p.lse_batch_stride = packed ? 0 : qv.heads * num_q;
  p.lse_head_stride = packed ? qv.rows : num_q;
  p.out = ov.data;
  p.lse = static_cast<float*>(lse.data_ptr());
  p.set_scale(scale, dtype == ScalarType::Half);
  p.batch = checked_int(batch, "batch");
  p.heads = checked_int(qv.heads, "heads");
  p.qhead_per_khead = p.heads / checked_int(kv.heads, "heads of k");
  p.max_seqlen_q = checked_int(num_q, "queries");
  p.max_seqlen_k = checked_int(num_k, "keys");
  p.rows_q = checked_int(qv.rows, "rows of q");
  p.rows_k = checked_int(kv.rows, "rows of k");
  p.rows_out = checked_int(ov.rows, "rows of out");
  const int64_t m_blocks = (num_q + attn::kBlockM - 1) / attn::kBlockM;
  const int num_tiles = checked_int(batch * qv.heads * m_blocks, "work tiles");
  const cudaStream_t stream = current_stream(q);
  std::optional<Tensor> gathered;
  if (p.kv_index != nullptr && gathers_first(qv, kv, vv, num_q)) gathered = gather_kv(p, kv, vv, q, stream);
  if (p.kv_index == nullptr) {
    // A TMA descriptor has no empty dimension. Without queries or keys there is no load.
    if (qv.rows > 0) p.tma_q = tma_descriptor_of(qv, dtype, attn::kWarpgroupRows);
    if (kv.rows > 0) {
      p.tma_k = tma_descriptor_of(kv, dtype, attn::kBlockN);
      p.tma_v = tma_descriptor_of(vv, dtype, attn::kBlockN);
    }
  }

  int num_ctas = 0;  // one an SM
  check_cuda(
      cudaDeviceGetAttribute(&num_ctas, cudaDevAttrMultiProcessorCount, q.get_device_index()), "mixed_res_attn");
  // Memory for the splits of the last partial wave. Without lengths on the device their number is known here.
  if (p.q_lens == nullptr && p.kv_lens == nullptr && !packed) {
    attn::plan_on_host(p.plan, p.max_seqlen_q, p.max_seqlen_k, num_tiles, num_ctas);
    p.max_split_tiles = p.plan.partial_wave_tiles;
  } else {
    p.max_split_tiles = std::min(num_tiles, num_ctas - 1);
  }
  std::optional<Tensor> workspace;
  if (p.max_split_tiles > 0) {
    const int64_t rows = (int64_t{p.max_split_tiles} + num_ctas) * attn::kBlockM;
    const int64_t split_tiles = p.plan.planned ? 0 : p.max_split_tiles;
    const int64_t floats = rows * (qv.dim + 2) + split_tiles * int64_t{sizeof(attn::SplitTile) / sizeof(float)};
    workspace = empty_on(q, {floats}, ScalarType::Float);
    p.out_partial = static_cast<float*>(workspace->data_ptr());
    p.max_sum_partial = reinterpret_cast<float2*>(p.out_partial + rows * qv.dim);
    p.split_tiles = reinterpret_cast<attn::SplitTile*>(p.max_sum_partial + rows);
  }
  if (dtype == ScalarType::BFloat16) launch<__nv_bfloat16>(p, qv.dim, num_ctas, stream);
  else launch<__half>(p, qv.dim, num_ctas, stream);
  return lse;
}

}  // namespace specedit
