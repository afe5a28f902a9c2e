// One variant: contiguous [N, H, D] bf16, bias or null. Returns 0, or 1 with a message on stderr.
#include <cstdio>
#include "mixed_res_attn/launch.cuh"
using namespace specedit;
using namespace specedit::attn;
static CUtensorMap map_of(void* data, int rows, int heads, int box_rows) {
  static decltype(&cuTensorMapEncodeTiled) fn = nullptr;
  if (!fn) { cudaDriverEntryPointQueryResult r; void* f = nullptr;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &r), "entry"); fn = (decltype(fn))f; }
  const cuuint64_t row = cuuint64_t(heads) * W_D * 2;
  const cuuint64_t dims[5] = {64, cuuint64_t(rows), W_D / 64, cuuint64_t(heads), 1}, st[4] = {row, 128, W_D * 2, row * rows};
  const cuuint32_t box[5] = {64, cuuint32_t(box_rows), W_D / 64, 1, 1}, one[5] = {1, 1, 1, 1, 1};
  CUtensorMap m;
  if (fn(&m, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5, data, dims, st, box, one, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
         CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS) throw std::runtime_error("tensor map");
  return m;
}
extern "C" __attribute__((visibility("default"))) int weak_attn(
    void* q, void* k, void* v, void* out, float* lse, float* bias, int nq, int nk, int heads, int dim, void* workspace, long bytes, void* stream, int* kv_index, int slots) {
  try {
    if (dim != W_D) throw std::runtime_error("dim");
    Params p{};
    const int64_t row = int64_t(heads) * W_D;
    p.q = q; p.k = k; p.v = v; p.out = out; p.lse = lse; p.bias = bias;
    p.q_strides = p.out_strides = {row * nq, row, W_D};
    p.k_strides = p.v_strides = {row * nk, row, W_D};
    p.lse_batch_stride = int64_t(heads) * nq; p.lse_head_stride = nq;
    p.batch = 1; p.heads = heads; p.qhead_per_khead = 1; p.max_seqlen_q = p.rows_q = p.rows_out = nq; p.max_seqlen_k = p.rows_k = nk;
    p.set_scale(1.0 / std::sqrt(double(W_D)), false);
#ifdef W_GATHER
    p.kv_index = kv_index; p.max_seqlen_k = slots;
#endif
    p.tma_q = map_of(q, nq, heads, kWarpgroupRows);
    p.tma_k = map_of(k, nk, heads, kBlockN);
    p.tma_v = map_of(v, nk, heads, kBlockN);
    int ctas = 0;
    check_cuda(cudaDeviceGetAttribute(&ctas, cudaDevAttrMultiProcessorCount, 0), "attribute");
    const int tiles = heads * ceil_div(nq, kBlockM);
    plan_on_host(p.plan, nq, p.max_seqlen_k, tiles, ctas, kBlockN);
    p.max_split_tiles = p.plan.partial_wave_tiles;
    if (p.max_split_tiles > 0) {
      const int64_t rows = (int64_t{p.max_split_tiles} + ctas) * kBlockM;
      if (rows * (W_D + 2) * 4 > bytes) throw std::runtime_error("workspace");
      p.out_partial = (float*)workspace;
      p.max_sum_partial = (float2*)(p.out_partial + rows * W_D);
    }
    launch<__nv_bfloat16, W_D,
#ifdef W_GATHER
        true
#else
        false
#endif
        >(p, ctas, (cudaStream_t)stream);
    return 0;
  } catch (const std::exception& e) { std::fprintf(stderr, "%s\n", e.what()); return 1; }
}
