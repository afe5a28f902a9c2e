// SPDX-License-Identifier: Apache-2.0
// mixed_res_attn and qk_norm_rope_scatter_ for programs without Python: their schemas, and implementations in ATen.
//
// In a Python process the package defines these ops, so nothing of it loads this library. Here the schemas stand a
// second time; tests/test_aoti.py holds them against the package's. Arithmetic is the reference's: fp32, one rounding.
// On CUDA, attention goes to the kernels of _C.abi3.so where the program has loaded that file too (sm_90a) and they serve
// the call; all else is ATen. Contracts: docs/ops.md; the packed layout (cu_seqlens) is not served.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#ifndef SPECEDIT_NAMESPACE
#define SPECEDIT_NAMESPACE specedit
#endif

namespace specedit::aten {
namespace {

using at::Tensor;
using Option = std::optional<Tensor>;

// Scores held at once, as in the reference.
constexpr int64_t kScoresAtOnce = int64_t{1} << 26;

bool is_float(const Tensor& x) {
  return x.scalar_type() == at::kFloat || x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16;
}

void check_like(const char* op, const char* name, const Tensor& x, const Tensor& q) {
  TORCH_CHECK_TYPE(x.scalar_type() == q.scalar_type(), op, ": ", name, ": expected q's dtype ", q.scalar_type(),
                   ", got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.device() == q.device(), op, ": ", name, ": expected q's device ", q.device(), ", got ",
                    x.device());
}

void check_shape(const char* op, const char* name, const Tensor& x, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(x.sizes() == sizes, op, ": ", name, ": expected shape ", sizes, ", got ", x.sizes());
}

// int32 [B, >= slots], values from -1 to rows - 1. Values are read where that costs nothing.
void check_index(const char* op, const char* name, const Option& index, int64_t batch, int64_t slots, int64_t rows) {
  if (!index) return;
  TORCH_CHECK_TYPE(index->scalar_type() == at::kInt, op, ": ", name, ": expected int32, got ", index->scalar_type());
  TORCH_CHECK_VALUE(index->dim() == 2 && index->size(0) == batch && index->size(1) >= slots, op, ": ", name,
                    ": expected shape [", batch, ", >= ", slots, "], got ", index->sizes());
  if (!index->is_cpu() || index->numel() == 0) return;
  const int64_t low = index->min().item<int64_t>(), high = index->max().item<int64_t>();
  TORCH_CHECK_VALUE(low >= -1 && high < rows, op, ": ", name, ": expected values from -1 to ", rows - 1, ", got ", low,
                    " to ", high);
}

void check_lens(const char* op, const char* name, const Option& lens, int64_t batch) {
  if (!lens) return;
  TORCH_CHECK_TYPE(lens->scalar_type() == at::kInt, op, ": ", name, ": expected int32, got ", lens->scalar_type());
  check_shape(op, name, *lens, {batch});
}

// Index of rows of x [B, rows, ...] in a shape that gather and scatter take; a -1 becomes `empty`.
Tensor rows_of(const Tensor& index, const Tensor& x, int64_t empty) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes[1] = index.size(1);
  Tensor rows = index.to(at::kLong).masked_fill(index.lt(0), empty);
  for (int64_t i = 2; i < x.dim(); ++i) rows = rows.unsqueeze(-1);
  return rows.expand(sizes);
}

// x [B, rows, ...] -> [B, slots, ...]; what a -1 gives is masked by the caller.
Tensor gathered(const Tensor& x, const Tensor& index) {
  return x.size(1) ? x.gather(1, rows_of(index, x, 0)) : x.new_zeros(rows_of(index, x, 0).sizes());
}

// src[b, i] to dst[b, index[b, i]]; rows that no index names keep their bits.
void scatter_rows(const Tensor& dst, const Tensor& src, const Tensor& index) {
  // skipped slots write to a row of their own, behind the last one
  std::vector<int64_t> sizes = dst.sizes().vec();
  const int64_t rows = sizes[1]++;
  Tensor longer = dst.new_empty(sizes);
  longer.narrow(1, 0, rows).copy_(dst);
  longer.scatter_(1, rows_of(index, src, rows), src);
  dst.copy_(longer.narrow(1, 0, rows));
}

// bool [B, slots] of the slots that hold a row; none where all do.
Option valid(int64_t slots, const Option& index, const Option& lens) {
  Option found;
  if (index) found = index->ge(0);
  if (lens) {
    const Tensor within = at::arange(slots, lens->options()).lt(lens->unsqueeze(1));
    found = found ? found->logical_and(within) : within;
  }
  return found;
}

std::tuple<Tensor, Tensor> attend(const Tensor& q, Tensor k, Tensor v, Option bias, const Option& key_valid,
                                  const Option& query_valid, double scale) {
  const int64_t batch = q.size(0), queries = q.size(1), heads = q.size(2), keys = k.size(1), kv_heads = k.size(2);
  k = k.to(at::kFloat);
  v = v.to(at::kFloat);
  if (key_valid) {
    const Tensor empty = key_valid->logical_not();
    // rows of empty slots may hold anything, NaN too
    k = k.masked_fill(empty.unsqueeze(-1).unsqueeze(-1), 0);
    v = v.masked_fill(empty.unsqueeze(-1).unsqueeze(-1), 0);
    if (!bias) bias = at::zeros({batch, keys}, k.options());
    bias = bias->masked_fill(empty, -INFINITY);
  }
  k = k.permute({0, 2, 3, 1}).unsqueeze(2);  // [B, Hk, 1, D, Nk]
  v = v.permute({0, 2, 1, 3}).unsqueeze(2);  // [B, Hk, 1, Nk, D]
  Tensor out = at::zeros({batch, queries, heads, q.size(3)}, q.options());
  Tensor lse = at::full({batch, heads, queries}, -INFINITY, q.options().dtype(at::kFloat));
  const int64_t step = std::max<int64_t>(1, kScoresAtOnce / std::max<int64_t>(1, batch * heads * keys));
  for (int64_t start = 0; keys > 0 && start < queries; start += step) {
    const int64_t n = std::min(step, queries - start);
    const Tensor part = q.narrow(1, start, n).to(at::kFloat).unflatten(2, {kv_heads, heads / kv_heads});
    Tensor score = part.permute({0, 2, 3, 1, 4}).matmul(k).mul_(scale);  // [B, Hk, G, n, Nk]
    if (bias) score += bias->unsqueeze(1).unsqueeze(1).unsqueeze(1);
    const Tensor top = score.amax(-1, true);
    const Tensor none = top.eq(-INFINITY);
    const Tensor weight = score.sub_(top.masked_fill(none, 0)).exp_();
    const Tensor total = weight.sum(-1, true).masked_fill(none, 1);
    const Tensor rows = weight.matmul(v).div_(total);
    out.narrow(1, start, n).copy_(rows.permute({0, 3, 1, 2, 4}).flatten(2, 3));
    lse.narrow(2, start, n).copy_((top + total.log()).squeeze(-1).flatten(1, 2));
  }
  if (query_valid) {
    const Tensor empty = query_valid->logical_not();
    out.masked_fill_(empty.unsqueeze(-1).unsqueeze(-1), 0);
    lse.masked_fill_(empty.unsqueeze(1), -INFINITY);
  }
  return {out, lse};
}

bool aligned(const Tensor& x) {
  if (reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16) return false;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) {
    if (x.size(i) > 1 && (x.stride(i) % 8 || x.stride(i) <= 0)) return false;
  }
  return true;
}

bool plain(const Option& x) { return !x || x->size(-1) <= 1 || x->stride(-1) == 1; }

// The kernel of _C.abi3.so, where it is loaded and serves the call; as ops/mixed_res_attn.py has it.
std::optional<c10::OperatorHandle> csrc_kernel(const Tensor& q, const Tensor& k, const Tensor& v, const Option& q_index,
                                               const Option& kv_index, const Option& q_lens, const Option& kv_lens,
                                               double scale) {
  if (!q.is_cuda() || q.scalar_type() == at::kFloat || (q.size(3) != 64 && q.size(3) != 128)) return std::nullopt;
  if (!(scale > 1e-6 && scale < 1e6) || q.size(0) > 512) return std::nullopt;
  if (!aligned(q) || !aligned(k) || !aligned(v)) return std::nullopt;
  if (!plain(q_index) || !plain(kv_index) || !plain(q_lens) || !plain(kv_lens)) return std::nullopt;
  const auto found = c10::Dispatcher::singleton().findSchema(
      {C10_STRINGIZE(SPECEDIT_NAMESPACE) "::mixed_res_attn_csrc", ""});
  if (!found || !found->hasKernelForDispatchKey(c10::DispatchKey::CUDA)) return std::nullopt;
  return found;
}

std::tuple<Tensor, Tensor> mixed_res_attn(
    const Tensor& q, const Tensor& k, const Tensor& v, const Option& key_bias, const Option& q_index,
    const Option& kv_index, const Option& q_lens, const Option& kv_lens, const Option& cu_seqlens_q,
    const Option& cu_seqlens_k, std::optional<int64_t> max_seqlen_q, std::optional<int64_t> max_seqlen_k,
    std::optional<double> scale) {
  constexpr const char* op = "mixed_res_attn";
  TORCH_CHECK_VALUE(!cu_seqlens_q && !cu_seqlens_k && !max_seqlen_q && !max_seqlen_k, op,
                    ": cu_seqlens_q: expected None (the C++ op serves the padded layout alone), got a packed layout");
  TORCH_CHECK_TYPE(is_float(q), op, ": q: expected bf16, fp16 or fp32, got ", q.scalar_type());
  for (const auto& [name, x] : {std::pair{"q", &q}, {"k", &k}, {"v", &v}}) {
    TORCH_CHECK_VALUE(x->dim() == 4, op, ": ", name, ": expected shape [B, S, H, D], got ", x->sizes());
    TORCH_CHECK_VALUE(x->size(3) <= 1 || x->stride(3) == 1, op, ": ", name, ": expected a contiguous last dimension");
    check_like(op, name, *x, q);
  }
  const int64_t batch = q.size(0), dim = q.size(3), kv_heads = k.size(2);
  TORCH_CHECK_VALUE(dim > 0 && dim % 16 == 0 && dim <= 256, op, ": q: expected a multiple of 16 up to 256, got ", dim);
  TORCH_CHECK_VALUE(k.size(0) == batch && k.size(3) == dim, op, ": k: expected shape [B=", batch, ", S, Hk, D=", dim,
                    "], got ", k.sizes());
  TORCH_CHECK_VALUE(kv_heads > 0 && q.size(2) % kv_heads == 0, op, ": k: expected heads that divide q's ", q.size(2),
                    ", got ", kv_heads);
  check_shape(op, "v", v, k.sizes());
  check_index(op, "q_index", q_index, batch, 0, q.size(1));
  check_index(op, "kv_index", kv_index, batch, 0, k.size(1));
  check_lens(op, "q_lens", q_lens, batch);
  check_lens(op, "kv_lens", kv_lens, batch);
  if (key_bias) {
    TORCH_CHECK_TYPE(key_bias->scalar_type() == at::kFloat, op, ": key_bias: expected fp32, got ",
                     key_bias->scalar_type());
    check_shape(op, "key_bias", *key_bias, {batch, k.size(1)});
  }
  const double factor = scale.value_or(1.0 / std::sqrt(static_cast<double>(dim)));
  if (const auto kernel = csrc_kernel(q, k, v, q_index, kv_index, q_lens, kv_lens, factor)) {
    Tensor out = at::empty({batch, q_index ? q_index->size(1) : q.size(1), q.size(2), dim}, q.options());
    const c10::IValue none;
    torch::jit::Stack stack = {out,    none,    q,    k,    v,    key_bias, q_index, kv_index,
                               q_lens, kv_lens, none, none, none, none,     factor};
    kernel->callBoxed(&stack);
    return {out, stack[0].toTensor()};
  }
  Tensor queries = q, keys = k, values = v;
  Option bias = key_bias;
  if (q_index) queries = gathered(q, *q_index);
  if (kv_index) {
    keys = gathered(k, *kv_index);
    values = gathered(v, *kv_index);
    if (bias) bias = gathered(*bias, *kv_index);
  }
  return attend(queries, keys, values, bias, valid(keys.size(1), kv_index, kv_lens),
                valid(queries.size(1), q_index, q_lens), factor);
}

// RMSNorm and rotation of x [B, N, H, D], in fp32, rounded once.
Tensor norm_rope(const Tensor& x, const Option& weight, const Tensor& cos, const Tensor& sin, int64_t split,
                 double eps) {
  Tensor y = x.to(at::kFloat);
  y = y * at::rsqrt(y.square().mean(-1, true) + eps);
  if (weight) {
    Tensor w = weight->to(at::kFloat);
    if (w.dim() == 2) {
      const Tensor set = at::arange(x.size(1), at::device(x.device()).dtype(at::kLong)).ge(split).to(at::kLong);
      w = w.index_select(0, set).unsqueeze(1);  // [N, 1, D]
    }
    y = y * w;
  }
  const Tensor pairs = y.unflatten(-1, {x.size(3) / 2, 2});
  const Tensor even = pairs.select(-1, 0), odd = pairs.select(-1, 1), c = cos.unsqueeze(2), s = sin.unsqueeze(2);
  return at::stack({even * c - odd * s, odd * c + even * s}, -1).flatten(-2).to(x.scalar_type());
}

void qk_norm_rope_scatter_(const Tensor& q_out, const Tensor& k_out, const Tensor& v_out, const Tensor& q,
                           const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
                           const Option& q_weight, const Option& k_weight, std::optional<int64_t> split,
                           const Option& q_out_index, const Option& kv_out_index, double eps) {
  constexpr const char* op = "qk_norm_rope_scatter_";
  TORCH_CHECK_TYPE(is_float(q), op, ": q: expected bf16, fp16 or fp32, got ", q.scalar_type());
  for (const auto& [name, x] : {std::pair{"q", &q}, {"k", &k}, {"v", &v}, {"q_out", &q_out}, {"k_out", &k_out},
                                {"v_out", &v_out}}) {
    TORCH_CHECK_VALUE(x->dim() == 4, op, ": ", name, ": expected four dimensions, got ", x->sizes());
    check_like(op, name, *x, q);
  }
  const int64_t batch = q.size(0), rows = q.size(1), heads = q.size(2), dim = q.size(3), kv_heads = k.size(2);
  TORCH_CHECK_VALUE(dim > 0 && dim % 2 == 0, op, ": q: expected an even last dimension, got ", dim);
  TORCH_CHECK_VALUE(kv_heads > 0 && heads % kv_heads == 0, op, ": k: expected heads that divide q's ", heads, ", got ",
                    kv_heads);
  check_shape(op, "k", k, {batch, rows, kv_heads, dim});
  check_shape(op, "v", v, k.sizes());
  check_shape(op, "q_out", q_out, {batch, q_out.size(1), heads, dim});
  check_shape(op, "k_out", k_out, {batch, k_out.size(1), kv_heads, dim});
  check_shape(op, "v_out", v_out, k_out.sizes());
  for (const auto& [name, table] : {std::pair{"cos", &cos}, {"sin", &sin}}) {
    TORCH_CHECK_TYPE(table->scalar_type() == at::kFloat, op, ": ", name, ": expected fp32, got ", table->scalar_type());
    TORCH_CHECK_VALUE(table->dim() == 3 && (table->size(0) == batch || table->size(0) == 1) &&
                          table->size(1) == rows && table->size(2) == dim / 2,
                      op, ": ", name, ": expected shape [", batch, " or 1, ", rows, ", ", dim / 2, "], got ",
                      table->sizes());
  }
  bool two_sets = false;
  for (const auto& [name, weight] : {std::pair{"q_weight", &q_weight}, {"k_weight", &k_weight}}) {
    if (!*weight) continue;
    const Tensor& w = **weight;
    TORCH_CHECK_VALUE(w.size(-1) == dim && (w.dim() == 1 || (w.dim() == 2 && w.size(0) == 2)), op, ": ", name,
                      ": expected shape [", dim, "] or [2, ", dim, "], got ", w.sizes());
    two_sets |= w.dim() == 2;
  }
  TORCH_CHECK_VALUE(two_sets == split.has_value() && split.value_or(0) >= 0 && split.value_or(0) <= rows, op,
                    ": split: expected a row from 0 to ", rows, " if and only if a weight has two sets");
  struct Part {
    const char* name;
    const Tensor& out;
    const Option& index;
    Tensor fresh;
  };
  const int64_t at = split.value_or(0);
  const Part parts[] = {{"q_out_index", q_out, q_out_index, norm_rope(q, q_weight, cos, sin, at, eps)},
                        {"kv_out_index", k_out, kv_out_index, norm_rope(k, k_weight, cos, sin, at, eps)},
                        {"kv_out_index", v_out, kv_out_index, v}};
  // all checks before the first write
  for (const auto& part : parts) {
    check_index(op, part.name, part.index, batch, rows, part.out.size(1));
    TORCH_CHECK_VALUE(part.index || part.out.size(1) >= rows, op, ": expected outputs of >= ", rows, " rows where ",
                      part.name, " is None, got ", part.out.sizes());
  }
  for (const auto& part : parts) {
    if (part.index) {
      scatter_rows(part.out, part.fresh, part.index->narrow(1, 0, rows));
    } else {
      part.out.narrow(1, 0, rows).copy_(part.fresh);
    }
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(SPECEDIT_NAMESPACE, m) {
  m.def(
      "mixed_res_attn(Tensor q, Tensor k, Tensor v, *, Tensor? key_bias=None, Tensor? q_index=None, "
      "Tensor? kv_index=None, Tensor? q_lens=None, Tensor? kv_lens=None, Tensor? cu_seqlens_q=None, "
      "Tensor? cu_seqlens_k=None, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, float? scale=None) -> "
      "(Tensor, Tensor)");
  m.def(
      "qk_norm_rope_scatter_(Tensor(a!) q_out, Tensor(b!) k_out, Tensor(c!) v_out, Tensor q, Tensor k, Tensor v, "
      "Tensor cos, Tensor sin, *, Tensor? q_weight=None, Tensor? k_weight=None, SymInt? split=None, "
      "Tensor? q_out_index=None, Tensor? kv_out_index=None, float eps=1e-6) -> ()");
  // of _C.abi3.so, which registers implementations alone
  m.def(
      "mixed_res_attn_csrc(Tensor(a!) out, Tensor? out_index, Tensor q, Tensor k, Tensor v, Tensor? key_bias, "
      "Tensor? q_index, Tensor? kv_index, Tensor? q_lens, Tensor? kv_lens, Tensor? cu_seqlens_q, "
      "Tensor? cu_seqlens_k, int? max_seqlen_q, int? max_seqlen_k, float scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(SPECEDIT_NAMESPACE, CPU, m) {
  m.impl("mixed_res_attn", &mixed_res_attn);
  m.impl("qk_norm_rope_scatter_", &qk_norm_rope_scatter_);
}

TORCH_LIBRARY_IMPL(SPECEDIT_NAMESPACE, CUDA, m) {
  m.impl("mixed_res_attn", &mixed_res_attn);
  m.impl("qk_norm_rope_scatter_", &qk_norm_rope_scatter_);
}

}  // namespace specedit::aten
