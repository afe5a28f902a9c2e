// SPDX-License-Identifier: Apache-2.0
// Host side of the attention on sm_90a: tensor maps, workspace, launch. No synchronisation; lengths stay on the device.
#include "mixed_res_attn/mixed_res_attn.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <climits>

#include "common.h"
#include "mixed_res_attn/gather_rows.cuh"
#include "mixed_res_attn/params.h"

namespace specedit {
namespace {

using attn::Params;
using attn::Strides;
using Option = std::optional<Tensor>;

// A tensor [B, S, H, D], or [T, H, D] as one batch entry. A dimension of size 1 has no stride worth minding.
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

decltype(&cuTensorMapEncodeTiled) encoder() {
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

// Boxes of `rows` rows of a head in panels of 64 columns, 128-byte swizzle; rows outside read as zeros.
CUtensorMap map_of(const View& x, ScalarType dtype, int rows) {
  constexpr int64_t kSize = 2;
  const auto bytes = [](int64_t stride) { return static_cast<cuuint64_t>(stride == 0 ? 16 : stride * kSize); };
  const cuuint64_t dims[5] = {64, static_cast<cuuint64_t>(x.rows), static_cast<cuuint64_t>(x.dim / 64),
                              static_cast<cuuint64_t>(x.heads), static_cast<cuuint64_t>(x.batch)};
  const cuuint64_t strides[4] = {bytes(x.strides.row), 128, bytes(x.strides.head), bytes(x.strides.batch)};
  const cuuint32_t box[5] = {64, static_cast<cuuint32_t>(rows), static_cast<cuuint32_t>(x.dim / 64), 1, 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result = encoder()(
      &map, dtype == ScalarType::BFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 5,
      x.data, dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("mixed_res_attn: cuTensorMapEncodeTiled: error " + std::to_string(result));
  }
  return map;
}

const int* ints(const Option& x) { return x.has_value() ? static_cast<const int*>(x->data_ptr()) : nullptr; }
int64_t batch_stride(const Option& x) { return x.has_value() && x->dim() > 1 && x->size(0) > 1 ? x->stride(0) : 0; }

int small(int64_t x, const char* what) {
  if (x < 0 || x > INT_MAX - 1024) throw std::invalid_argument(std::string("mixed_res_attn: too large: ") + what);
  return static_cast<int>(x);
}

template <typename T>
void launch(const Params& p, int64_t dim, int blocks, cudaStream_t stream) {
  const bool gather = p.kv_index != nullptr;
  if (dim == 64) {
    (gather ? attn::launch<T, 64, true> : attn::launch<T, 64, false>)(p, blocks, stream);
  } else {
    (gather ? attn::launch<T, 128, true> : attn::launch<T, 128, false>)(p, blocks, stream);
  }
}

// Whether rows by kv_index are gathered before the attention. By itself it gathers them for each tile of queries, which
// costs issue slots; and it knows strides of 32 bits, in bytes, only.
bool gathers_first(const View& q, const View& k, const View& v, int64_t num_q) {
  const int64_t tiles = q.heads / k.heads * ((num_q + attn::kBlockM - 1) / attn::kBlockM);
  return tiles >= attn::kGatherFirst || std::max(k.strides.row, v.strides.row) > INT_MAX / 2;
}

// Gathers k, v and bias of all slots of kv_index into `workspace`; p and the views then describe a call without index.
Tensor gather_rows(Params& p, View& k, View& v, const Tensor& q, cudaStream_t stream) {
  const int64_t row = k.heads * k.dim;
  const int64_t slots = k.batch * p.num_k;
  Tensor workspace = empty_on(q, {slots * (row + 1)}, ScalarType::Float);
  uint4* const out = static_cast<uint4*>(workspace.data_ptr());
  attn::RowsParams r{};
  const auto in_words = [](const Strides& x) { return Strides{x.batch / 8, x.row / 8, x.head / 8}; };
  r.k = static_cast<const uint4*>(p.k);
  r.v = static_cast<const uint4*>(p.v);
  r.k_strides = in_words(p.k_strides);
  r.v_strides = in_words(p.v_strides);
  r.bias = p.bias;
  r.index = p.kv_index;
  r.lens = p.kv_lens;
  r.bias_batch = p.bias_batch;
  r.index_batch = p.kv_index_batch;
  r.words = small(row / 8, "a row of k");
  r.head_shift = k.dim == 64 ? 3 : 4;
  r.k_out = out;
  r.v_out = out + slots * r.words;
  r.bias_out = reinterpret_cast<float*>(out + 2 * slots * r.words);
  r.batch = p.batch;
  r.slots = p.num_k;
  r.rows = p.rows_k;
  const int blocks = attn::ceil_div(small(slots, "slots of kv_index"), attn::kGatherThreads / 32);
  if (blocks > 0) attn::gather_rows_kernel<<<blocks, attn::kGatherThreads, 0, stream>>>(r);
  check_cuda(cudaGetLastError(), "mixed_res_attn");
  const Strides dense{p.num_k * row, row, k.dim};
  k = View{r.k_out, dense, k.batch, p.num_k, k.heads, k.dim};
  v = View{r.v_out, dense, k.batch, p.num_k, k.heads, k.dim};
  p.k = r.k_out;
  p.v = r.v_out;
  p.k_strides = p.v_strides = dense;
  p.bias = r.bias_out;
  p.bias_batch = p.num_k;
  p.kv_index = nullptr;
  p.rows_k = p.num_k;
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
  p.q_index = ints(q_index);
  p.kv_index = ints(kv_index);
  p.out_index = ints(out_index);
  p.q_lens = ints(q_lens);
  p.kv_lens = ints(kv_lens);
  p.cu_q = ints(cu_seqlens_q);
  p.cu_k = ints(cu_seqlens_k);
  p.bias_batch = batch_stride(key_bias);
  p.q_index_batch = batch_stride(q_index);
  p.kv_index_batch = batch_stride(kv_index);
  p.out_index_batch = batch_stride(out_index);
  p.lse_batch = packed ? 0 : qv.heads * num_q;
  p.lse_head = packed ? qv.rows : num_q;
  p.out = ov.data;
  p.lse = static_cast<float*>(lse.data_ptr());
  p.score_unit = static_cast<float>(scale * 1.4426950408889634);
  p.bias_unit = static_cast<float>(1.0 / scale);
  p.slack = attn::kSlack / p.score_unit;
  p.batch = small(batch, "batch");
  p.heads = small(qv.heads, "heads");
  p.group = p.heads / small(kv.heads, "heads of k");
  p.num_q = small(num_q, "queries");
  p.num_k = small(num_k, "keys");
  p.rows_q = small(qv.rows, "rows of q");
  p.rows_k = small(kv.rows, "rows of k");
  p.rows_out = small(ov.rows, "rows of out");
  const int64_t all_tiles = batch * qv.heads * ((num_q + attn::kBlockM - 1) / attn::kBlockM);
  const int tiles = small(all_tiles, "tiles");
  const cudaStream_t stream = current_stream(q);
  std::optional<Tensor> gathered;
  if (p.kv_index != nullptr && gathers_first(qv, kv, vv, num_q)) gathered = gather_rows(p, kv, vv, q, stream);
  if (p.kv_index == nullptr) {
    // A map has no empty dimension; without queries or keys no copy is made.
    if (qv.rows > 0) p.q_map = map_of(qv, dtype, attn::kRows);
    if (kv.rows > 0) {
      p.k_map = map_of(kv, dtype, attn::kBlockN);
      p.v_map = map_of(vv, dtype, attn::kBlockN);
    }
  }

  int blocks = 0;
  check_cuda(cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, q.get_device_index()), "mixed_res_attn");
  // Room for the parts of the last round's tiles. Without lengths on the device their number is known here.
  const bool known = p.q_lens == nullptr && p.kv_lens == nullptr && !packed;
  if (known) attn::plan_on_host(p, tiles, blocks);
  else p.most_cut = std::min(tiles, blocks - 1);
  std::optional<Tensor> workspace;
  if (p.most_cut > 0) {
    const int64_t rows = (int64_t{p.most_cut} + blocks) * attn::kBlockM;
    const int64_t notes = known ? 0 : p.most_cut * static_cast<int64_t>(sizeof(attn::CutTile) / sizeof(float));
    const int64_t floats = rows * (qv.dim + 1) + notes;
    workspace = empty_on(q, {floats}, ScalarType::Float);
    p.part_out = static_cast<float*>(workspace->data_ptr());
    p.part_lse = p.part_out + rows * qv.dim;
    p.cut_tiles = reinterpret_cast<attn::CutTile*>(p.part_lse + rows);
  }
  if (dtype == ScalarType::BFloat16) launch<__nv_bfloat16>(p, qv.dim, blocks, stream);
  else launch<__half>(p, qv.dim, blocks, stream);
  return lse;
}

}  // namespace specedit
