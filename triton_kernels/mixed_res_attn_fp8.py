# SPDX-License-Identifier: Apache-2.0
"""Attention on e4m3 numbers with fp32 scales, a per-key bias, row gather and device-side lengths, in Triton.

The online softmax of FlashAttention (Dao et al., arXiv 2205.14135, algorithm 1) in base 2. Weights are rounded to e4m3
for the second product, times 256, so that those down to 2^-14 of the largest are normal numbers of it. Where v has a
scale a row, a weight takes that in before it is rounded, relative to the largest scale so far.
"""

import torch
import triton
import triton.language as tl

from ._fp8 import has_e4m3, to_e4m3
from .mixed_res_attn import Config, _device_class, _on_device, _select_splits

# By (device class, padded head dim), as `mixed_res_attn.DENSE_CONFIGS`; chosen by what fits, unmeasured.
CONFIGS = {
    ("large", 64): Config(128, 128, 8, 3),
    ("large", 128): Config(128, 128, 8, 3),
    ("large", 256): Config(128, 64, 8, 2),
    ("small", 64): Config(64, 64, 4, 3),
    ("small", 128): Config(64, 64, 4, 2),
    ("small", 256): Config(32, 32, 4, 2),
}
# Numbers that change with every mask: no kernel is compiled again for their values.
LENGTHS = (
    "heads", "group", "num_tiles", "num_q", "num_k", "rows_q", "rows_k", "stride_qib", "stride_kib",
    "stride_lb", "stride_lh", "stride_ls",
)  # fmt: skip


@triton.jit
def _load_of(pointers, valid):
    """A number of each row, 0 where not `valid` (None: all are)."""
    if valid is not None:
        return tl.load(pointers, mask=valid, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _attend(
    q, unit, k_base, v_base, k_scale, v_scale, bias, rows, valid, stride_kn, stride_vn, stride_vd, stride_ksn,
    stride_vsn, d, acc, total, top, largest,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PANEL: tl.constexpr, NEGATE: tl.constexpr, K_ROWS: tl.constexpr,
    V_ROWS: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """One tile of keys. PANEL: keys of a panel of v, 0 where v lies as k. unit [BLOCK_M]: >= 0, what makes q k^T a
    power of two. valid: None or [BLOCK_N], which rows exist. top: the largest score so far. largest: of v's scales."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    SHIFT: tl.constexpr = 8.0  # 2^8 is the largest weight, and 448 e4m3's largest number
    rows = rows.to(tl.int64)
    k_at = k_base + rows[:, None] * stride_kn + d[None, :]
    if PANEL:
        v_at = v_base + (rows // PANEL * stride_vn + rows % PANEL)[:, None] + d.to(tl.int64)[None, :] * stride_vd
    else:
        v_at = v_base + rows[:, None] * stride_vn + d[None, :]
    # 0 where there is no row, so that there is no 0 * NaN
    if valid is not None:
        k = tl.load(k_at, mask=valid[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        v = tl.load(v_at, mask=valid[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM != BLOCK_D:
        k = tl.load(k_at, mask=(d < HEAD_DIM)[None, :], other=0.0)
        v = tl.load(v_at, mask=(d < HEAD_DIM)[None, :], other=0.0)
    else:
        k = tl.load(k_at)
        v = tl.load(v_at)
    score = tl.dot(q, tl.trans(k))
    if NEGATE:
        score = -score
    if K_ROWS:
        score *= _load_of(k_scale + rows * stride_ksn, valid)[None, :]
    if bias is not None:
        score = score * unit[:, None] + (_load_of(bias + rows, valid) * LOG2_E)[None, :]
    if valid is not None:
        score = tl.where(valid[None, :], score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, 1))
    # A row that has met no key yet has top -inf, and -inf - -inf is NaN: keep what is subtracted finite.
    pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
    score -= pivot[:, None]
    kept = top - pivot
    if bias is None:
        score *= unit[:, None]
        kept *= unit
    p = tl.exp2(score + SHIFT)
    kept = tl.where(top == float("-inf"), 0.0, tl.exp2(kept))
    if valid is not None:
        # Also where the unit is 0, and -inf * 0 NaN.
        p = tl.where(valid[None, :], p, 0.0)
    total = total * kept + tl.sum(p, 1)
    if V_ROWS:
        of_row = _load_of(v_scale + rows * stride_vsn, valid)
        new_largest = tl.maximum(largest, tl.max(of_row, 0))
        p *= (of_row / new_largest)[None, :]
        kept *= largest / new_largest
        largest = new_largest
    weight = to_e4m3(p, HARDWARE).to(tl.float8e4nv, bitcast=True)
    return tl.dot(weight, v, acc * kept[:, None]), total, new_top, largest


@triton.jit(do_not_specialize=LENGTHS)
def _attn_fp8_kernel(
    q_ptr, k_ptr, v_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, bias_ptr, q_index_ptr, kv_index_ptr, q_lens_ptr,
    kv_lens_ptr, out_ptr, lse_ptr, scale,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh, stride_vd,
    stride_qsb, stride_qsn, stride_qsh, stride_ksb, stride_ksn, stride_ksh, stride_vsb, stride_vsn, stride_vsh,
    stride_bias, stride_qib, stride_kib, stride_ob, stride_on, stride_oh, stride_os, stride_lb, stride_lh, stride_ls,
    heads, group, num_tiles, num_q, num_k, rows_q, rows_k,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PANEL: tl.constexpr,
    SPLITS: tl.constexpr, NEGATE: tl.constexpr, K_ROWS: tl.constexpr, V_ROWS: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    LOG2_E: tl.constexpr = 1.4426950408889634
    # Query tiles of one head run side by side, so that its K and V are read from L2.
    pid = tl.program_id(0)
    tile = pid % num_tiles
    rest = pid // num_tiles
    split = rest % SPLITS
    rest = rest // SPLITS
    h = rest % heads
    b = (rest // heads).to(tl.int64)
    kv_head = h // group
    q_len = num_q
    k_len = num_k
    if q_lens_ptr is not None:
        q_len = tl.minimum(q_len, tl.load(q_lens_ptr + b))
    if kv_lens_ptr is not None:
        k_len = tl.minimum(k_len, tl.load(kv_lens_ptr + b))

    slot = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    live = slot < q_len
    if q_index_ptr is not None:
        q_rows = tl.load(q_index_ptr + b * stride_qib + slot, mask=live, other=-1)
        live = live & (q_rows >= 0) & (q_rows < rows_q)
    else:
        q_rows = slot
    q_rows = q_rows.to(tl.int64)
    q_at = q_ptr + b * stride_qb + h * stride_qh + q_rows[:, None] * stride_qn + d[None, :]
    q = tl.load(q_at, mask=live[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    q_scale = q_scale_ptr + b * stride_qsb + h * stride_qsh + q_rows * stride_qsn
    unit = tl.load(q_scale, mask=live, other=0.0) * (scale * LOG2_E)
    k_scale_ptr += b * stride_ksb + kv_head * stride_ksh
    v_scale_ptr += b * stride_vsb + kv_head * stride_vsh
    if not K_ROWS:
        unit *= tl.load(k_scale_ptr)
    k_ptr += b * stride_kb + kv_head * stride_kh
    v_ptr += b * stride_vb + kv_head * stride_vh
    if bias_ptr is not None:
        bias_ptr += b * stride_bias

    # This split's keys [lo, hi): whole K tiles but for the last. None if the tile has no query.
    per_split = tl.cdiv(tl.cdiv(k_len, BLOCK_N), SPLITS) * BLOCK_N
    lo = split * per_split
    hi = tl.minimum(k_len, lo + per_split)
    hi = tl.maximum(lo, tl.where(tile * BLOCK_M < q_len, hi, lo))
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    largest = tl.full([], 1.1754943508222875e-38, dtype=tl.float32)  # never 0: it divides
    if kv_index_ptr is not None:
        for start in range(lo, hi, BLOCK_N):
            rows = tl.load(kv_index_ptr + b * stride_kib + start + n, mask=start + n < hi, other=-1)
            valid = (rows >= 0) & (rows < rows_k)
            acc, total, top, largest = _attend(
                q, unit, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, bias_ptr, rows, valid,
                stride_kn, stride_vn, stride_vd, stride_ksn, stride_vsn, d, acc, total, top, largest,
                HEAD_DIM, BLOCK_D, PANEL, NEGATE, K_ROWS, V_ROWS, HARDWARE,
            )  # fmt: skip
    else:
        full = lo + (hi - lo) // BLOCK_N * BLOCK_N
        for start in range(lo, full, BLOCK_N):
            acc, total, top, largest = _attend(
                q, unit, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, bias_ptr, start + n, None,
                stride_kn, stride_vn, stride_vd, stride_ksn, stride_vsn, d, acc, total, top, largest,
                HEAD_DIM, BLOCK_D, PANEL, NEGATE, K_ROWS, V_ROWS, HARDWARE,
            )  # fmt: skip
        if full < hi:
            acc, total, top, largest = _attend(
                q, unit, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, bias_ptr, full + n, full + n < hi,
                stride_kn, stride_vn, stride_vd, stride_ksn, stride_vsn, d, acc, total, top, largest,
                HEAD_DIM, BLOCK_D, PANEL, NEGATE, K_ROWS, V_ROWS, HARDWARE,
            )  # fmt: skip

    # A query in an empty slot met keys with q = 0; its result is that of no key.
    empty = (total == 0.0) | ~live
    if bias_ptr is None:
        top *= unit
    factor = largest
    if not V_ROWS:
        factor = tl.load(v_scale_ptr)
    out = tl.where(empty[:, None], 0.0, acc * (factor / tl.where(empty, 1.0, total))[:, None])
    lse = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total)) - 8.0) / LOG2_E)
    part = split.to(tl.int64)
    exists = slot < num_q
    tl.store(lse_ptr + part * stride_ls + b * stride_lb + h * stride_lh + slot, lse, mask=exists)
    out_at = out_ptr + part * stride_os + b * stride_ob + h * stride_oh + slot.to(tl.int64)[:, None] * stride_on
    tl.store(
        out_at + d[None, :], out.to(out_ptr.dtype.element_ty), mask=exists[:, None] & (d < HEAD_DIM)[None, :]
    )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "num_tiles", "num_rows", "stride_lb", "stride_lh", "stride_ls"])
def _join_kernel(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, stride_pb, stride_pn, stride_ph, stride_ps, stride_lb, stride_lh,
    stride_ls, heads, num_tiles, num_rows,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Join the splits of BLOCK_R rows of one head; out and lse have the layout of one split."""
    pid = tl.program_id(0)
    slot = pid % num_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    h = pid // num_tiles % heads
    b = (pid // num_tiles // heads).to(tl.int64)
    exists = slot < num_rows
    d = tl.arange(0, BLOCK_D)
    mask = exists[:, None] & (d < HEAD_DIM)[None, :]
    at = b * stride_pb + h * stride_ph + slot.to(tl.int64)[:, None] * stride_pn + d[None, :]
    lse_at = b * stride_lb + h * stride_lh + slot
    top = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
    for s in tl.static_range(SPLITS):
        top = tl.maximum(top, tl.load(part_lse_ptr + s * stride_ls + lse_at, mask=exists, other=float("-inf")))
    pivot = tl.where(top == float("-inf"), 0.0, top)
    acc = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_R], dtype=tl.float32)
    for s in tl.static_range(SPLITS):
        weight = tl.exp(tl.load(part_lse_ptr + s * stride_ls + lse_at, mask=exists, other=float("-inf")) - pivot)
        total += weight
        acc += weight[:, None] * tl.load(part_ptr + s * stride_ps + at, mask=mask, other=0.0)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    tl.store(lse_ptr + lse_at, tl.where(empty, float("-inf"), pivot + tl.log(total)), mask=exists)
    tl.store(out_ptr + at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


def _plan(device, head_dim, programs_of, num_k, config, splits):
    name, slots = _device_class(device)
    block_d = max(32, triton.next_power_of_2(head_dim))
    config = config or CONFIGS["large" if name == "large" else "small", max(64, block_d)]
    if splits is None:
        splits = _select_splits(programs_of(config.block_m), -(-num_k // config.block_n), slots)
    return block_d, config, splits


def launch(
    q, k, v, q_scale, k_scale, v_scale, key_bias, q_index, kv_index, q_lens, kv_lens, scale, config=None, splits=None
):  # fmt: skip
    """`mixed_res_attn_fp8`; `config` and `splits` override the tables (benchmarks, tests)."""
    batch, num_q = q.shape[:2] if q_index is None else q_index.shape
    num_k = k.shape[1] if kv_index is None else kv_index.shape[1]
    heads, head_dim = q.shape[2:]
    out = torch.empty((batch, num_q, heads, head_dim), dtype=torch.bfloat16, device=q.device)
    lse = torch.empty((batch, heads, num_q), dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    block_d, config, splits = _plan(
        q.device, head_dim, lambda block_m: -(-num_q // block_m) * heads * batch, num_k, config, splits
    )
    num_tiles = -(-num_q // config.block_m)
    part, part_lse, part_stride, lse_stride = out, lse, 0, 0
    if splits > 1:
        part = torch.empty((splits, *out.shape), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((splits, *lse.shape), dtype=torch.float32, device=q.device)
        part_stride, lse_stride = part.stride(0), part_lse.stride(0)
    k_rows, v_rows = k_scale.shape[1] != 1, v_scale.shape[1] != 1
    with _on_device(q.device):
        _attn_fp8_kernel[(num_tiles * splits * heads * batch,)](
            q, k, v, q_scale, k_scale, v_scale, key_bias, q_index, kv_index, q_lens, kv_lens, part, part_lse,
            abs(scale),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:4], *_by_row(q_scale), *_by_row(k_scale), *_by_row(v_scale),
            0 if key_bias is None else key_bias.stride(0), 0 if q_index is None else q_index.stride(0),
            0 if kv_index is None else kv_index.stride(0),
            *out.stride()[:3], part_stride, *lse.stride()[:2], lse_stride,
            heads, heads // k.shape[2], num_tiles, num_q, num_k, q.shape[1], k.shape[1],
            HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            PANEL=v.shape[4] if v.dim() == 5 else 0, SPLITS=splits, NEGATE=scale < 0, K_ROWS=k_rows, V_ROWS=v_rows,
            HARDWARE=has_e4m3(q.device),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        if splits > 1:
            block_r = 16
            row_tiles = -(-num_q // block_r)
            _join_kernel[(row_tiles * heads * batch,)](
                part, part_lse, out, lse, *out.stride()[:3], part_stride, *lse.stride()[:2], lse_stride,
                heads, row_tiles, num_q,
                HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_R=block_r, SPLITS=splits, num_warps=4,
            )  # fmt: skip
    return out, lse


def _by_row(scale):
    """Strides over samples, rows and heads of a scale [B, rows or 1, heads]."""
    return scale.stride(0), scale.stride(1) if scale.shape[1] != 1 else 0, scale.stride(2)


def mixed_res_attn_fp8(
    q, k, v, q_scale, k_scale, v_scale, key_bias, q_index, kv_index, q_lens, kv_lens, scale
):  # fmt: skip
    """Launch the attention. Returns out bf16 [B, Nq, H, D] and lse fp32 [B, H, Nq]."""
    return launch(q, k, v, q_scale, k_scale, v_scale, key_bias, q_index, kv_index, q_lens, kv_lens, scale)
