# SPDX-License-Identifier: Apache-2.0
"""RMSNorm and rotation of q and k and the write of q, k, v to their rows: one pass over each, bound by memory."""

import torch
import triton
import triton.language as tl

from ._fp8 import has_e4m3, to_e4m3
from ._rows import row_of_slot

# Elements of q, of k and of v that one program takes: in 16-bit types, a 16-byte vector of each for 128 threads. The
# three are loaded together; a few such programs on each SM keep enough in flight, and 24 heads of 128 fit without rest.
_TILE = 1024
# Tokens of a program that writes e4m3: of one head, so that numbers of a panel of v lie side by side.
_FP8_TOKENS = 32


@triton.jit
def _rows_of(n, first_head, heads, num_tokens, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """Token and head of each row of a tile [TOKENS * HEADS, D], and whether it exists."""
    r = tl.arange(0, TOKENS * HEADS)
    token = n + r // HEADS
    head = first_head + r % HEADS
    return token, head.to(tl.int64), (token < num_tokens) & (head < heads)


@triton.jit
def _table(ptr, stride_n, stride_d, token, exists, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D / 2] of cos or sin."""
    j = tl.arange(0, BLOCK_D // 2)
    mask = exists[:, None] & (j < HEAD_DIM // 2)[None, :]
    return tl.load(ptr + (token.to(tl.int64) * stride_n)[:, None] + (j * stride_d)[None, :], mask=mask, other=0.0)


@triton.jit
def _weight(ptr, stride_set, token, split, exists, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] of the norm's weights, of the first set before `split` and of the second from there on."""
    d = tl.arange(0, BLOCK_D)
    at = (token >= split).to(tl.int32) * stride_set
    return tl.load(ptr + at[:, None] + d[None, :], mask=exists[:, None] & (d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _rotate(x, cos, sin, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rotate neighbouring pairs of channels. x: [ROWS, BLOCK_D], cos and sin: [ROWS, BLOCK_D / 2], all fp32."""
    even, odd = tl.split(tl.reshape(x, [ROWS, BLOCK_D // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), [ROWS, BLOCK_D])


@triton.jit
def _divided(x, scale_ptr, b, stride_b, stride_h, head, exists, HARDWARE: tl.constexpr):
    """x [rows, D], fp32, over the scale of each row's head, as codes of e4m3."""
    scale = tl.load(scale_ptr + b * stride_b + head * stride_h, mask=exists, other=1.0)
    # a division of each number costs more than all else that is done with it
    return to_e4m3(x * (1.0 / scale)[:, None], HARDWARE)


@triton.jit(do_not_specialize=["num_tokens", "rows_q", "rows_kv", "heads", "kv_heads", "split"])
def _qk_norm_rope_scatter_kernel(
    q_out_ptr, k_out_ptr, v_out_ptr, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr,
    q_index_ptr, kv_index_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr,
    stride_qob, stride_qon, stride_qoh, stride_kob, stride_kon, stride_koh, stride_vob, stride_von, stride_voh,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_cb, stride_cn, stride_cd, stride_sb, stride_sn, stride_sd, stride_qw, stride_kw,
    stride_qib, stride_qin, stride_kib, stride_kin,
    stride_vod, stride_qsb, stride_qsh, stride_ksb, stride_ksh, stride_vsb, stride_vsh,
    num_tokens, rows_q, rows_kv, heads, kv_heads, split, eps,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    SLICES: tl.constexpr, FP8: tl.constexpr, PANEL: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs take neighbouring heads of the same tokens.
    first = tl.program_id(0) % SLICES
    block = tl.program_id(0) // SLICES
    blocks = tl.cdiv(num_tokens, TOKENS)
    b = (block // blocks).to(tl.int64)
    n = (block % blocks) * TOKENS
    d = tl.arange(0, BLOCK_D)
    in_head = (d < HEAD_DIM)[None, :]

    q_token, q_head, q_exists = _rows_of(n, first * HEADS, heads, num_tokens, TOKENS, HEADS)
    kv_token, kv_head, kv_exists = _rows_of(n, first * KV_HEADS, kv_heads, num_tokens, TOKENS, KV_HEADS)
    q_n, kv_n = q_token.to(tl.int64), kv_token.to(tl.int64)
    q_mask, kv_mask = q_exists[:, None] & in_head, kv_exists[:, None] & in_head

    # All that is read is asked for before the first of it is used.
    q_at = b * stride_qb + q_n * stride_qn + q_head * stride_qh
    k_at = b * stride_kb + kv_n * stride_kn + kv_head * stride_kh
    v_at = b * stride_vb + kv_n * stride_vn + kv_head * stride_vh
    q = tl.load(q_ptr + q_at[:, None] + d[None, :], mask=q_mask, other=0.0)
    k = tl.load(k_ptr + k_at[:, None] + d[None, :], mask=kv_mask, other=0.0)
    v = tl.load(v_ptr + v_at[:, None] + d[None, :], mask=kv_mask, other=0.0)
    cos_ptr += b * stride_cb
    sin_ptr += b * stride_sb
    q_cos = _table(cos_ptr, stride_cn, stride_cd, q_token, q_token < num_tokens, HEAD_DIM, BLOCK_D)
    q_sin = _table(sin_ptr, stride_sn, stride_sd, q_token, q_token < num_tokens, HEAD_DIM, BLOCK_D)
    if KV_HEADS == HEADS:
        # The same tokens, whatever heads of them q and k have: those they do not have are masked when it is written.
        k_cos, k_sin = q_cos, q_sin
    else:
        k_cos = _table(cos_ptr, stride_cn, stride_cd, kv_token, kv_exists, HEAD_DIM, BLOCK_D)
        k_sin = _table(sin_ptr, stride_sn, stride_sd, kv_token, kv_exists, HEAD_DIM, BLOCK_D)
    if q_weight_ptr is not None:
        q_weight = _weight(q_weight_ptr, stride_qw, q_token, split, q_exists, HEAD_DIM, BLOCK_D)
    if k_weight_ptr is not None:
        k_weight = _weight(k_weight_ptr, stride_kw, kv_token, split, kv_exists, HEAD_DIM, BLOCK_D)
    if q_index_ptr is not None:
        q_index_ptr += b * stride_qib
    if kv_index_ptr is not None:
        kv_index_ptr += b * stride_kib
    q_row, q_written = row_of_slot(q_index_ptr, stride_qin, q_token, q_exists, rows_q)
    kv_row, kv_written = row_of_slot(kv_index_ptr, stride_kin, kv_token, kv_exists, rows_kv)

    q = q.to(tl.float32)
    k = k.to(tl.float32)
    q = q * tl.rsqrt(tl.sum(q * q, axis=1) / HEAD_DIM + eps)[:, None]
    k = k * tl.rsqrt(tl.sum(k * k, axis=1) / HEAD_DIM + eps)[:, None]
    if q_weight_ptr is not None:
        q = q * q_weight.to(tl.float32)
    if k_weight_ptr is not None:
        k = k * k_weight.to(tl.float32)
    q = _rotate(q, q_cos, q_sin, TOKENS * HEADS, BLOCK_D)
    k = _rotate(k, k_cos, k_sin, TOKENS * KV_HEADS, BLOCK_D)
    if FP8:
        q = _divided(q, q_scale_ptr, b, stride_qsb, stride_qsh, q_head, q_exists, HARDWARE)
        k = _divided(k, k_scale_ptr, b, stride_ksb, stride_ksh, kv_head, kv_exists, HARDWARE)
        v = _divided(v.to(tl.float32), v_scale_ptr, b, stride_vsb, stride_vsh, kv_head, kv_exists, HARDWARE)
    else:
        q = q.to(q_out_ptr.dtype.element_ty)
        k = k.to(k_out_ptr.dtype.element_ty)

    q_at = b * stride_qob + q_row * stride_qon + q_head * stride_qoh
    k_at = b * stride_kob + kv_row * stride_kon + kv_head * stride_koh
    tl.store(q_out_ptr + q_at[:, None] + d[None, :], q, mask=q_written[:, None] & in_head)
    tl.store(k_out_ptr + k_at[:, None] + d[None, :], k, mask=kv_written[:, None] & in_head)
    v_at = b * stride_vob + kv_head * stride_voh
    if PANEL:
        # Neighbouring threads write neighbouring keys.
        v_at += kv_row // PANEL * stride_von + kv_row % PANEL
        v_mask = (d < HEAD_DIM)[:, None] & kv_written[None, :]
        tl.store(v_out_ptr + (d.to(tl.int64) * stride_vod)[:, None] + v_at[None, :], tl.trans(v), mask=v_mask)
    else:
        v_at += kv_row * stride_von
        tl.store(v_out_ptr + v_at[:, None] + d[None, :], v, mask=kv_written[:, None] & in_head)


def tile(tokens, heads, kv_heads, head_dim, fp8=False):
    """(BLOCK_D, TOKENS, HEADS, KV_HEADS, SLICES, num_warps): a program's tile, in how many slices the heads are cut."""
    block_d = max(2, triton.next_power_of_2(head_dim))
    # Of no heads of q, k and v are still to be written.
    heads = max(heads, 1)
    if fp8:
        q_heads, block_n = 1, min(triton.next_power_of_2(tokens), _FP8_TOKENS)
    else:
        q_heads = min(triton.next_power_of_2(heads), max(1, _TILE // block_d))
        block_n = min(triton.next_power_of_2(tokens), max(1, _TILE // block_d // q_heads))
    slices = triton.cdiv(heads, q_heads)
    kv_heads = triton.next_power_of_2(triton.cdiv(kv_heads, slices))
    # 8 elements of q to a thread.
    return block_d, block_n, q_heads, kv_heads, slices, min(8, max(1, block_n * q_heads * block_d // 256))


def _broadcast(table):
    """Strides of a rotary table [B or 1, N, D/2]."""
    return (0 if table.shape[0] == 1 else table.stride(0), table.stride(1), table.stride(2))


def qk_norm_rope_scatter_(
    q_out, k_out, v_out, q, k, v, cos, sin, q_weight, k_weight, split, q_out_index, kv_out_index, eps
):
    """q [B, N, H, D], k and v [B, N, Hk, D], tables fp32 [B or 1, N, D/2]. Writes into q_out, k_out and v_out."""
    _launch(
        q_out, k_out, v_out, q, k, v, None, None, None, cos, sin, q_weight, k_weight, split, q_out_index, kv_out_index,
        eps,
    )  # fmt: skip


def qk_norm_rope_scatter_fp8_(q_out, k_out, v_out, *args):
    """The same into e4m3; scales fp32 [B, 1, H] and [B, 1, Hk]; v_out [B, panels, Hk, D, keys]."""
    _launch(*(x.view(torch.uint8) for x in (q_out, k_out, v_out)), *args)


def _launch(
    q_out, k_out, v_out, q, k, v, q_scale, k_scale, v_scale, cos, sin, q_weight, k_weight, split, q_out_index,
    kv_out_index, eps,
):  # fmt: skip
    if q.numel() == 0 and k.numel() == 0:
        return
    batch, tokens, heads, head_dim = q.shape
    fp8 = q_scale is not None
    block_d, block_n, q_heads, kv_heads, slices, num_warps = tile(tokens, heads, k.shape[2], head_dim, fp8)
    with torch.cuda.device_of(q):
        _qk_norm_rope_scatter_kernel[(batch * triton.cdiv(tokens, block_n) * slices,)](
            q_out, k_out, v_out, q, k, v, cos, sin, q_weight, k_weight, q_out_index, kv_out_index, q_scale, k_scale,
            v_scale,
            *(stride for x in (q_out, k_out, v_out, q, k, v) for stride in x.stride()[:3]),
            *_broadcast(cos), *_broadcast(sin),
            *(x.stride(0) if x is not None and x.ndim == 2 else 0 for x in (q_weight, k_weight)),
            *(stride for x in (q_out_index, kv_out_index) for stride in (x.stride() if x is not None else (0, 0))),
            v_out.stride(3),
            *(x for s in (q_scale, k_scale, v_scale) for x in ((0, 0) if s is None else s.stride()[::2])),
            tokens, q_out.shape[1], k_out.shape[1], heads, k.shape[2], split, eps,
            HEAD_DIM=head_dim, BLOCK_D=block_d, TOKENS=block_n, HEADS=q_heads, KV_HEADS=kv_heads, SLICES=slices,
            FP8=fp8, PANEL=v_out.shape[4] if fp8 else 0, HARDWARE=has_e4m3(q.device), num_warps=num_warps,
        )  # fmt: skip
