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
# The same where q and k become e4m3, for a 16-byte vector of those. v has programs of its own there.
_FP8_TILE = 2048
# Tokens of a program that writes v in e4m3: of one head. With 64 it needs registers that q and k have no use for.
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


@triton.jit
def _word(a, b, c, d, HARDWARE: tl.constexpr):
    """The codes of four fp32 numbers in an int32, the first one lowest."""
    if HARDWARE:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 x, y; cvt.rn.satfinite.e4m3x2.f32 x, $2, $1; cvt.rn.satfinite.e4m3x2.f32 y, $4, $3; "
            "mov.b32 $0, {x, y}; }",
            "=r,f,f,f,f", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        low = to_e4m3(a, False).to(tl.int32) | (to_e4m3(b, False).to(tl.int32) << 8)
        return low | (to_e4m3(c, False).to(tl.int32) << 16) | (to_e4m3(d, False).to(tl.int32) << 24)


@triton.jit
def _v_rows(v_ptr, stride_vn, index_ptr, stride_kin, token, num_tokens, rows, d, inverse, HEAD_DIM: tl.constexpr):
    """v [tokens, D] over its scale, fp32, the row of each token, and whether it is to be written."""
    exists = token < num_tokens
    mask = exists[:, None] & (d < HEAD_DIM)[None, :]
    x = tl.load(v_ptr + (token.to(tl.int64) * stride_vn)[:, None] + d[None, :], mask=mask, other=0.0)
    row, written = row_of_slot(index_ptr, stride_kin, token, exists, rows)
    return x.to(tl.float32) * inverse, row, written


@triton.jit
def _out_of_order(row, written, first):
    return tl.where(written & (row == first), 0, 1)


@triton.jit
def _flat(x, D: tl.constexpr, N: tl.constexpr):
    """x [N] of every one of D channels, as [D * N]."""
    return tl.reshape(tl.broadcast_to(x[None, :], [D, N]), [D * N])


@triton.jit
def _store_byte(v_out_ptr, word, row, written, stride_von, stride_vod, SHIFT: tl.constexpr, HEAD_DIM: tl.constexpr,
                BLOCK_D: tl.constexpr, N: tl.constexpr, PANEL: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    # A flat tensor, for neighbouring threads to have neighbouring keys. Where neither of two dimensions is known to be
    # contiguous, Triton 3.6 gives them neighbours in the first one, 3.9 in the second: with channels there, each byte
    # would go to a sector of its own.
    d = tl.arange(0, BLOCK_D * N) // N
    at = _flat(row // PANEL * stride_von * UNIT + row % PANEL, BLOCK_D, N) + d.to(tl.int64) * stride_vod * UNIT
    mask = _flat(written.to(tl.int32), BLOCK_D, N) > 0
    tl.store(v_out_ptr + at, ((word >> SHIFT) & 0xFF).to(tl.uint8), mask=mask & (d < HEAD_DIM))


@triton.jit
def _store_bytes(
    v_out_ptr, word, row0, row1, row2, row3, written0, written1, written2, written3, stride_von, stride_vod,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, N: tl.constexpr, PANEL: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Words [BLOCK_D, N] of four keys of a channel, to rows that may be any. UNIT: bytes of what strides count."""
    word = tl.reshape(word, [BLOCK_D * N])
    _store_byte(v_out_ptr, word, row0, written0, stride_von, stride_vod, 0, HEAD_DIM, BLOCK_D, N, PANEL, UNIT)
    _store_byte(v_out_ptr, word, row1, written1, stride_von, stride_vod, 8, HEAD_DIM, BLOCK_D, N, PANEL, UNIT)
    _store_byte(v_out_ptr, word, row2, written2, stride_von, stride_vod, 16, HEAD_DIM, BLOCK_D, N, PANEL, UNIT)
    _store_byte(v_out_ptr, word, row3, written3, stride_von, stride_vod, 24, HEAD_DIM, BLOCK_D, N, PANEL, UNIT)


@triton.jit
def _write_panels(
    v_out_ptr, v_words_ptr, v_ptr, index_ptr, scale_ptr, stride_vob, stride_von, stride_voh, stride_vod,
    stride_vb, stride_vn, stride_vh, stride_kib, stride_kin, stride_vsb, stride_vsh, program, num_tokens, rows,
    kv_heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr, PANEL: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """One head of TOKENS tokens of v, to their rows in panels. Each thread makes words of four keys of a channel.

    With v_words_ptr, the same memory as v_out_ptr, the strides are those of words.
    """
    WORDS: tl.constexpr = TOKENS // 4
    head = (program % kv_heads).to(tl.int64)
    block = program // kv_heads
    blocks = tl.cdiv(num_tokens, TOKENS)
    b = (block // blocks).to(tl.int64)
    n = block % blocks * TOKENS
    token = n + 4 * tl.arange(0, WORDS)
    d = tl.arange(0, BLOCK_D)
    v_ptr += b * stride_vb + head * stride_vh
    inverse = 1.0 / tl.load(scale_ptr + b * stride_vsb + head * stride_vsh)
    if index_ptr is not None:
        index_ptr += b * stride_kib
        first = tl.load(index_ptr + n.to(tl.int64) * stride_kin)
    else:
        first = n
    x0, row0, written0 = _v_rows(
        v_ptr, stride_vn, index_ptr, stride_kin, token, num_tokens, rows, d, inverse, HEAD_DIM)  # fmt: skip
    x1, row1, written1 = _v_rows(
        v_ptr, stride_vn, index_ptr, stride_kin, token + 1, num_tokens, rows, d, inverse, HEAD_DIM)  # fmt: skip
    x2, row2, written2 = _v_rows(
        v_ptr, stride_vn, index_ptr, stride_kin, token + 2, num_tokens, rows, d, inverse, HEAD_DIM)  # fmt: skip
    x3, row3, written3 = _v_rows(
        v_ptr, stride_vn, index_ptr, stride_kin, token + 3, num_tokens, rows, d, inverse, HEAD_DIM)  # fmt: skip
    word = tl.trans(_word(x0, x1, x2, x3, HARDWARE))
    v_at = b * stride_vob + head * stride_voh
    if v_words_ptr is not None:
        at = first + 4 * tl.arange(0, WORDS)
        wrong = _out_of_order(row0, written0, at) + _out_of_order(row1, written1, at + 1)
        wrong += _out_of_order(row2, written2, at + 2) + _out_of_order(row3, written3, at + 3)
        if (tl.sum(wrong) == 0) & (first % TOKENS == 0):
            in_panel = tl.multiple_of(first % PANEL // 4, WORDS)
            to_ptr = v_words_ptr + v_at + (first // PANEL).to(tl.int64) * stride_von + in_panel
            to_ptrs = to_ptr + (d.to(tl.int64) * stride_vod)[:, None] + tl.arange(0, WORDS)[None, :]
            tl.store(to_ptrs, word, mask=(d < HEAD_DIM)[:, None])
        else:
            _store_bytes(
                v_out_ptr + v_at * 4, word, row0, row1, row2, row3, written0, written1, written2, written3, stride_von,
                stride_vod, HEAD_DIM, BLOCK_D, WORDS, PANEL, 4,
            )  # fmt: skip
    else:
        _store_bytes(
            v_out_ptr + v_at, word, row0, row1, row2, row3, written0, written1, written2, written3, stride_von,
            stride_vod, HEAD_DIM, BLOCK_D, WORDS, PANEL, 1,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "rows_q", "rows_kv", "heads", "kv_heads", "split", "v_programs"])
def _qk_norm_rope_scatter_kernel(
    q_out_ptr, k_out_ptr, v_out_ptr, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr,
    q_index_ptr, kv_index_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, v_words_ptr,
    stride_qob, stride_qon, stride_qoh, stride_kob, stride_kon, stride_koh, stride_vob, stride_von, stride_voh,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_cb, stride_cn, stride_cd, stride_sb, stride_sn, stride_sd, stride_qw, stride_kw,
    stride_qib, stride_qin, stride_kib, stride_kin,
    stride_vod, stride_qsb, stride_qsh, stride_ksb, stride_ksh, stride_vsb, stride_vsh,
    num_tokens, rows_q, rows_kv, heads, kv_heads, split, eps, v_programs,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    SLICES: tl.constexpr, FP8: tl.constexpr, V_TOKENS: tl.constexpr, PANEL: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if FP8:
        if program < v_programs:
            _write_panels(
                v_out_ptr, v_words_ptr, v_ptr, kv_index_ptr, v_scale_ptr, stride_vob, stride_von, stride_voh,
                stride_vod, stride_vb, stride_vn, stride_vh, stride_kib, stride_kin, stride_vsb, stride_vsh, program,
                num_tokens, rows_kv, kv_heads, HEAD_DIM, BLOCK_D, V_TOKENS, PANEL, HARDWARE,
            )  # fmt: skip
            return
        program -= v_programs
    # Neighbouring programs take neighbouring heads of the same tokens.
    first = program % SLICES
    block = program // SLICES
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
    if not FP8:
        v_at = b * stride_vb + kv_n * stride_vn + kv_head * stride_vh
    q = tl.load(q_ptr + q_at[:, None] + d[None, :], mask=q_mask, other=0.0)
    k = tl.load(k_ptr + k_at[:, None] + d[None, :], mask=kv_mask, other=0.0)
    if not FP8:
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
    else:
        q = q.to(q_out_ptr.dtype.element_ty)
        k = k.to(k_out_ptr.dtype.element_ty)

    q_at = b * stride_qob + q_row * stride_qon + q_head * stride_qoh
    k_at = b * stride_kob + kv_row * stride_kon + kv_head * stride_koh
    tl.store(q_out_ptr + q_at[:, None] + d[None, :], q, mask=q_written[:, None] & in_head)
    tl.store(k_out_ptr + k_at[:, None] + d[None, :], k, mask=kv_written[:, None] & in_head)
    if not FP8:
        v_at = b * stride_vob + kv_head * stride_voh
        v_at += kv_row * stride_von
        tl.store(v_out_ptr + v_at[:, None] + d[None, :], v, mask=kv_written[:, None] & in_head)


def tile(tokens, heads, kv_heads, head_dim, fp8=False):
    """(BLOCK_D, TOKENS, HEADS, KV_HEADS, SLICES, num_warps): a program's tile, in how many slices the heads are cut."""
    block_d = max(2, triton.next_power_of_2(head_dim))
    # Of no heads of q, k and v are still to be written.
    heads = max(heads, 1)
    rows = max(1, (_FP8_TILE if fp8 else _TILE) // block_d)
    q_heads = min(triton.next_power_of_2(heads), max(1, _TILE // block_d))
    block_n = min(triton.next_power_of_2(tokens), max(1, rows // q_heads))
    slices = triton.cdiv(heads, q_heads)
    kv_heads = triton.next_power_of_2(triton.cdiv(kv_heads, slices))
    # 8 elements of q to a thread, or 16 that become e4m3.
    return block_d, block_n, q_heads, kv_heads, slices, 4 if fp8 else min(8, max(1, block_n * q_heads * block_d // 256))


def panel_tokens(tokens):
    """Tokens of a program that writes v in e4m3."""
    return max(4, min(triton.next_power_of_2(tokens), _FP8_TOKENS))


def _words(v_out):
    """v_out, uint8, as int32 words of four keys, or None where they are not aligned."""
    if v_out.data_ptr() % 16 or any(stride % 16 for stride in v_out.stride()[:4]):
        return None
    return v_out.view(torch.int32)


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
    v_words, v_tokens, v_programs, v_strides = None, 0, 0, v_out.stride()
    if fp8:
        v_words, v_tokens = _words(v_out), panel_tokens(tokens)
        v_programs = batch * triton.cdiv(tokens, v_tokens) * k.shape[2]
        v_strides = (v_out if v_words is None else v_words).stride()
    with torch.cuda.device_of(q):
        _qk_norm_rope_scatter_kernel[(v_programs + batch * triton.cdiv(tokens, block_n) * slices,)](
            q_out, k_out, v_out, q, k, v, cos, sin, q_weight, k_weight, q_out_index, kv_out_index, q_scale, k_scale,
            v_scale, v_words,
            *q_out.stride()[:3], *k_out.stride()[:3], *v_strides[:3],
            *(stride for x in (q, k, v) for stride in x.stride()[:3]),
            *_broadcast(cos), *_broadcast(sin),
            *(x.stride(0) if x is not None and x.ndim == 2 else 0 for x in (q_weight, k_weight)),
            *(stride for x in (q_out_index, kv_out_index) for stride in (x.stride() if x is not None else (0, 0))),
            v_strides[3],
            *(x for s in (q_scale, k_scale, v_scale) for x in ((0, 0) if s is None else s.stride()[::2])),
            tokens, q_out.shape[1], k_out.shape[1], heads, k.shape[2], split, eps, v_programs,
            HEAD_DIM=head_dim, BLOCK_D=block_d, TOKENS=block_n, HEADS=q_heads, KV_HEADS=kv_heads, SLICES=slices,
            FP8=fp8, V_TOKENS=v_tokens, PANEL=v_out.shape[4] if fp8 else 0, HARDWARE=has_e4m3(q.device),
            num_warps=num_warps,
        )  # fmt: skip
