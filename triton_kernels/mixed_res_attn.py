# SPDX-License-Identifier: Apache-2.0
"""Attention with a per-key bias, row gather, device-side lengths and log-sum-exp, in Triton.

One program computes one tile of queries of one head against the keys of its batch entry (or against one of
``SPLITS`` equal parts of them, joined by a second kernel), with the online softmax of FlashAttention (Dao et al.,
arXiv 2205.14135, algorithm 1) in base 2. Every feature that a call does not use is compiled out.
"""

import contextlib
import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ._softmax import softmax_step

# Arguments that follow the token counts, which change with every mask: no kernel is compiled again for their values.
LENGTHS = (
    "heads", "group", "num_tiles", "num_q", "num_k", "num_rows", "rows_q", "rows_k", "rows_out",
    "stride_qib", "stride_kib", "stride_oib",
    "stride_lb", "stride_lh", "stride_ls", "stride_plb", "stride_plh", "stride_pls",
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Tile sizes of one launch. tma: dense K and V tiles come through host-made tensor descriptors."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False


# (device class, padded head dim) -> config, for 16-bit inputs. "large" has 227 KB of shared memory a block (sm_90,
# sm_100), "medium" 163 KB (sm_80), "small" 99 KB (sm_86, sm_89, sm_120).
# Measured at ("large", 128) on an H100, 24 heads with bias (table: bench/log/mixed_res_attn.md): at 8704 x 8704 keys
# 128x128 with 3 stages 1850 us, 128x64 with 3 stages 1921, 64x64 2150, 128x128 with 2 stages 2329, pointers instead of
# descriptors 2174 at best. 3 stages take 225 KB: one block an SM. The other rows are chosen by what fits, unmeasured.
DENSE_CONFIGS = {
    ("large", 64): Config(128, 128, 8, 3, tma=True),
    ("large", 128): Config(128, 128, 8, 3, tma=True),
    ("large", 256): Config(128, 64, 8, 2, tma=True),
    ("medium", 64): Config(128, 64, 4, 3),
    ("medium", 128): Config(128, 64, 8, 3),
    ("medium", 256): Config(32, 32, 4, 2),
    ("small", 64): Config(64, 64, 4, 3),
    ("small", 128): Config(128, 32, 8, 2),
    ("small", 256): Config(32, 32, 4, 2),
}
# With kv_index a row's address is data, so K and V tiles are copied row by row. Measured at ("large", 128) on an H100:
# 128x64 with 2, 3 or 4 stages and 64x64 with 2 are within 5 % at 8704 x 8704 (4057 to 4250 us); at 922 x 8704 this one
# is the fastest (661 us).
GATHER_CONFIGS = {
    ("large", 64): Config(128, 64, 8, 3),
    ("large", 128): Config(128, 64, 8, 3),
    ("large", 256): Config(64, 64, 8, 2),
}
# fp32 products run on the CUDA cores, which hold whole rows in registers: the tiles that spill least.
FP32_CONFIGS = {64: Config(32, 32, 8, 1), 128: Config(32, 32, 8, 1), 256: Config(16, 16, 8, 1)}


@triton.jit
def _load_rows(base, rows, valid, stride_row, d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK_N, BLOCK_D] of `base`; 0 where not `valid` (None: all are), so that there is no 0 * NaN."""
    pointers = base + rows.to(tl.int64)[:, None] * stride_row + d[None, :]
    if valid is not None:
        tile = tl.load(pointers, mask=valid[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM != BLOCK_D:
        tile = tl.load(pointers, mask=(d < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def _attend(q, k, v, bias, valid, acc, total, top, scale):
    """One K tile of the attention. bias: None or [BLOCK_N], natural log; valid: None or [BLOCK_N], if there is a key.

    `top` is a score times scale plus bias; without biases, a score as the product gives it.
    """
    LOG2_E: tl.constexpr = 1.4426950408889634
    qk = tl.dot(q, tl.trans(k), input_precision="ieee")
    if bias is None:
        unit = scale * LOG2_E
    else:
        qk = qk * scale + bias[None, :]
        unit = LOG2_E
    p, kept, total, top = softmax_step(qk, valid, unit, total, top)
    acc = tl.dot(p.to(v.dtype), v, acc * kept[:, None], input_precision="ieee")
    return acc, total, top


@triton.jit
def _store_rows(
    out_ptr, lse_ptr, out_index_ptr, b, h, slot, exists, row0, acc, total, top,
    stride_ob, stride_on, stride_oh, stride_lb, stride_lh, stride_oib, rows_out,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Normalise and write the rows of one tile: 0 and -inf where a query met no key (total == 0)."""
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    out = tl.where(empty[:, None], 0.0, acc / total[:, None])
    lse = tl.where(empty, float("-inf"), top + tl.log(total))
    row = row0 + slot
    tl.store(lse_ptr + b * stride_lb + h * stride_lh + row, lse, mask=exists)
    if out_index_ptr is not None:
        row = tl.load(out_index_ptr + b * stride_oib + slot, mask=exists, other=-1)
        exists = exists & (row >= 0) & (row < rows_out)
    d = tl.arange(0, BLOCK_D)
    tl.store(
        out_ptr + b * stride_ob + h * stride_oh + row.to(tl.int64)[:, None] * stride_on + d[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=exists[:, None] & (d < HEAD_DIM)[None, :],
    )


@triton.jit(do_not_specialize=LENGTHS)
def _attn_kernel(
    q_ptr, k_ptr, v_ptr, k_desc, v_desc, bias_desc, bias_ptr, q_index_ptr, kv_index_ptr, out_index_ptr,
    q_lens_ptr, kv_lens_ptr, cu_q_ptr, cu_k_ptr, out_ptr, lse_ptr, part_top_ptr, scale,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_bias, stride_qib, stride_kib, stride_oib,
    stride_ob, stride_on, stride_oh, stride_os, stride_lb, stride_lh, stride_ls,
    heads, group, num_tiles, num_q, num_k, rows_q, rows_k, rows_out,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr, NEGATE: tl.constexpr,
):  # fmt: skip
    # Query tiles of one head run side by side, so that its K and V are read from L2.
    pid = tl.program_id(0)
    tile = pid % num_tiles
    rest = pid // num_tiles
    split = rest % SPLITS
    rest = rest // SPLITS
    h = rest % heads
    b = (rest // heads).to(tl.int64)

    q_row0 = 0
    k_row0 = 0
    q_batch = b
    k_batch = b
    if cu_q_ptr is not None:
        q_row0 = tl.maximum(tl.load(cu_q_ptr + b), 0)
        k_row0 = tl.maximum(tl.load(cu_k_ptr + b), 0)
        num_q = tl.minimum(tl.load(cu_q_ptr + b + 1), rows_q) - q_row0
        num_k = tl.minimum(tl.load(cu_k_ptr + b + 1), rows_k) - k_row0
        q_batch = b * 0
        k_batch = b * 0
    q_len = num_q
    k_len = num_k
    if q_lens_ptr is not None:
        q_len = tl.minimum(q_len, tl.load(q_lens_ptr + b))
    if kv_lens_ptr is not None:
        k_len = tl.minimum(k_len, tl.load(kv_lens_ptr + b))

    slot = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    live = slot < q_len
    if q_index_ptr is not None:
        q_rows = tl.load(q_index_ptr + b * stride_qib + slot, mask=live, other=-1)
        live = live & (q_rows >= 0) & (q_rows < rows_q)
    else:
        q_rows = q_row0 + slot
    q = _load_rows(q_ptr + q_batch * stride_qb + h * stride_qh, q_rows, live, stride_qn, d, HEAD_DIM, BLOCK_D)
    if NEGATE:
        # The pivot is max(qk) * scale, which needs scale >= 0. A sign flip of q is exact.
        q = -q

    # This split's keys [lo, hi): whole K tiles but for the last. None if the tile has no query.
    per_split = tl.cdiv(tl.cdiv(k_len, BLOCK_N), SPLITS) * BLOCK_N
    lo = split * per_split
    hi = tl.minimum(k_len, lo + per_split)
    hi = tl.maximum(lo, tl.where(tile * BLOCK_M < q_len, hi, lo))

    kv_head = h // group
    k_base = k_ptr + k_batch * stride_kb + kv_head * stride_kh
    v_base = v_ptr + k_batch * stride_vb + kv_head * stride_vh
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    n = tl.arange(0, BLOCK_N)

    if kv_index_ptr is not None:
        for start in range(lo, hi, BLOCK_N):
            rows = tl.load(kv_index_ptr + b * stride_kib + start + n, mask=start + n < hi, other=-1)
            valid = (rows >= 0) & (rows < rows_k)
            if bias_ptr is not None:
                bias = tl.load(bias_ptr + b * stride_bias + rows, mask=valid, other=float("-inf"))
            else:
                bias = tl.where(valid, 0.0, float("-inf"))
            k = _load_rows(k_base, rows, valid, stride_kn, d, HEAD_DIM, BLOCK_D)
            v = _load_rows(v_base, rows, valid, stride_vn, d, HEAD_DIM, BLOCK_D)
            acc, total, top = _attend(q, k, v, bias, None, acc, total, top, scale)
    else:
        full = lo + (hi - lo) // BLOCK_N * BLOCK_N
        if bias_ptr is not None:
            bias_base = bias_ptr + k_batch * stride_bias + k_row0 + n
        for start in range(lo, full, BLOCK_N):
            bias = None
            if bias_desc is not None:
                bias = bias_desc.load([k_batch.to(tl.int32), k_row0 + start]).reshape(BLOCK_N)
            elif bias_ptr is not None:
                bias = tl.load(bias_base + start)
            if k_desc is not None:
                at = [k_batch.to(tl.int32), kv_head, k_row0 + start, 0]
                k = k_desc.load(at).reshape(BLOCK_N, BLOCK_D)
                v = v_desc.load(at).reshape(BLOCK_N, BLOCK_D)
            else:
                k = _load_rows(k_base, k_row0 + start + n, None, stride_kn, d, HEAD_DIM, BLOCK_D)
                v = _load_rows(v_base, k_row0 + start + n, None, stride_vn, d, HEAD_DIM, BLOCK_D)
            acc, total, top = _attend(q, k, v, bias, None, acc, total, top, scale)
        if full < hi:
            valid = full + n < hi
            bias = None
            if bias_ptr is not None:
                bias = tl.load(bias_base + full, mask=valid, other=0.0)
            k = _load_rows(k_base, k_row0 + full + n, valid, stride_kn, d, HEAD_DIM, BLOCK_D)
            v = _load_rows(v_base, k_row0 + full + n, valid, stride_vn, d, HEAD_DIM, BLOCK_D)
            acc, total, top = _attend(q, k, v, bias, valid, acc, total, top, scale)

    if bias_ptr is None and kv_index_ptr is None:
        top *= scale
    # A query in an empty slot met keys with q = 0; its result is that of no key.
    total = tl.where(live, total, 0.0)
    if SPLITS == 1:
        _store_rows(
            out_ptr, lse_ptr, out_index_ptr, q_batch, h, slot, slot < num_q, q_row0, acc, total, top,
            stride_ob, stride_on, stride_oh, stride_lb, stride_lh, stride_oib, rows_out, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    else:
        # Sums as they are, and the largest score beside them: in their logarithm rounding would take the sum of the
        # weights off a large score, and with it how much the parts weigh.
        part = split.to(tl.int64)
        row = q_row0 + slot
        at = part * stride_ls + q_batch * stride_lb + h * stride_lh + row
        tl.store(lse_ptr + at, total, mask=slot < num_q)
        tl.store(part_top_ptr + at, top, mask=slot < num_q)
        at = part * stride_os + q_batch * stride_ob + h * stride_oh + row.to(tl.int64)[:, None] * stride_on
        tl.store(out_ptr + at + d[None, :], acc, mask=(slot < num_q)[:, None] & (d < HEAD_DIM)[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def _combine_kernel(
    part_ptr, part_total_ptr, part_top_ptr, out_index_ptr, out_ptr, lse_ptr,
    stride_pb, stride_pn, stride_ph, stride_ps, stride_plb, stride_plh, stride_pls, stride_oib,
    stride_ob, stride_on, stride_oh, stride_lb, stride_lh,
    heads, num_tiles, num_rows, rows_out,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Join the splits of BLOCK_R rows of one head: their sums, each after its own largest score."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    pid = tl.program_id(0)
    slot = pid % num_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    rest = pid // num_tiles
    h = rest % heads
    b = (rest // heads).to(tl.int64)
    exists = slot < num_rows
    d = tl.arange(0, BLOCK_D)
    part = part_ptr + b * stride_pb + h * stride_ph + slot.to(tl.int64)[:, None] * stride_pn + d[None, :]
    part_row = b * stride_plb + h * stride_plh + slot
    top = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
    for s in tl.static_range(SPLITS):
        filled = exists & (tl.load(part_total_ptr + part_row + s * stride_pls, mask=exists, other=0.0) != 0.0)
        top = tl.maximum(top, tl.load(part_top_ptr + part_row + s * stride_pls, mask=filled, other=float("-inf")))
    acc = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_R], dtype=tl.float32)
    for s in tl.static_range(SPLITS):
        part_total = tl.load(part_total_ptr + part_row + s * stride_pls, mask=exists, other=0.0)
        # A part without keys has no top, and may be unwritten memory.
        filled = exists & (part_total != 0.0)
        part_top = tl.load(part_top_ptr + part_row + s * stride_pls, mask=filled, other=0.0)
        weight = tl.where(filled, tl.exp2((part_top - top) * LOG2_E), 0.0)
        total += weight * part_total
        mask = filled[:, None] & (d < HEAD_DIM)[None, :]
        acc += weight[:, None] * tl.load(part + s * stride_ps, mask=mask, other=0.0)
    _store_rows(
        out_ptr, lse_ptr, out_index_ptr, b, h, slot, exists, 0, acc, total, top,
        stride_ob, stride_on, stride_oh, stride_lb, stride_lh, stride_oib, rows_out, HEAD_DIM, BLOCK_D,
    )  # fmt: skip


@functools.cache
def _device_class(device):
    """(class, number of multiprocessors) of a CUDA device; the smallest class for any other device."""
    if device.type != "cuda":
        return "small", 1
    properties = torch.cuda.get_device_properties(device)
    if properties.major in (9, 10):
        name = "large"
    else:
        name = "medium" if (properties.major, properties.minor) == (8, 0) else "small"
    return name, properties.multi_processor_count


def _select_config(name, itemsize, block_d, gathered):
    bucket = max(64, block_d)
    if itemsize == 4:
        return FP32_CONFIGS[bucket]
    if gathered and name == "large":
        return GATHER_CONFIGS[name, bucket]
    return DENSE_CONFIGS[name, bucket]


def _select_splits(num_programs, num_k_tiles, slots):
    """How many parts to cut the keys into: a function of shapes alone, so that equal calls give equal bits.

    The cost is in K tiles: the waves of programs times their length. A program's own start and end, and what a split
    adds (its fp32 part written, read and joined by one more kernel), count as some K tiles more.

    Measured with 132 slots and 68 K tiles of 128 (H100), us for 1, 2, 3, 4 parts: 192 programs (922 queries) 297, 234,
    256, 254; 288 programs (1536 queries) 449, 395, 371, 387. The constants make the fastest of each the cheapest.
    """
    best, best_cost = 1, None
    for splits in range(1, 9):
        if splits > 1 and num_k_tiles < 8 * splits:
            break
        waves = -(-num_programs * splits // slots)
        cost = waves * (-(-num_k_tiles // splits) + 2)
        if splits > 1:
            cost += 4 + 2 * num_programs * splits / slots
        if best_cost is None or cost < best_cost:
            best, best_cost = splits, cost
    return best


@functools.lru_cache(maxsize=4096)
def _plan(device, itemsize, head_dim, gathered, heads, num_q, num_k, config, splits):
    """(padded head dim, config, query tiles, splits) of a launch; `heads` counts those of the whole batch.

    One lookup a call: the host time of a launch is paid in every layer of every step.
    """
    name, slots = _device_class(device)
    block_d = max(16, triton.next_power_of_2(head_dim))
    if config is None:
        config = _select_config(name, itemsize, block_d, gathered)
    num_tiles = -(-num_q // config.block_m)
    if splits is None:
        splits = _select_splits(num_tiles * heads, -(-num_k // config.block_n), slots)
    return block_d, config, num_tiles, splits


_NO_SWITCH = contextlib.nullcontext()


def _on_device(device):
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NO_SWITCH
    return torch.cuda.device(device)


def _descriptor(x, shape, strides, block):
    """Descriptor of x seen with `shape` and `strides`, the last of which is 1; None where there can be none."""
    unit = 16 // x.element_size()
    if x.data_ptr() % 16:
        return None
    for i, size in enumerate(shape[:-1]):
        if size == 1:
            strides[i] = unit  # never stepped along: any legal number
        elif size < 1 or strides[i] % unit or strides[i] <= 0:
            return None
    # Not through the constructor, which would spend some microseconds on the same checks.
    descriptor = object.__new__(TensorDescriptor)
    descriptor.base, descriptor.shape, descriptor.strides, descriptor.block_shape = x, shape, strides, block
    return descriptor


def _launch(
    out, out_index, q, k, v, key_bias, q_index, kv_index, q_lens, kv_lens,
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, config=None, splits=None,
):  # fmt: skip
    """Run the kernels on `out` and return lse. `config` and `splits` override the tables (benchmarks, tests)."""
    packed = cu_seqlens_q is not None
    device = q.device
    if packed:
        # Packed rows are one long batch entry; cu_seqlens cut it in the kernel.
        batch, num_q, num_k = cu_seqlens_q.shape[0] - 1, max_seqlen_q, max_seqlen_k
        lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=device)
        q, k, v, out4, lse3 = q[None], k[None], v[None], out[None], lse[None]
        if key_bias is not None:
            key_bias = key_bias[None]
    else:
        batch, num_q = q.shape[:2] if q_index is None else q_index.shape
        num_k = k.shape[1] if kv_index is None else kv_index.shape[1]
        lse = torch.empty((batch, q.shape[2], num_q), dtype=torch.float32, device=device)
        out4, lse3 = out, lse
    if batch == 0 or num_q == 0 or lse.numel() == 0:
        if out_index is None:
            out.zero_()
        return lse.fill_(float("-inf"))

    _, rows_q, heads, head_dim = q.shape
    entries, rows_k, heads_k, _ = k.shape
    stride_qb, stride_qn, stride_qh, _ = q.stride()
    stride_kb, stride_kn, stride_kh, _ = k.stride()
    stride_vb, stride_vn, stride_vh, _ = v.stride()
    block_d, config, num_tiles, splits = _plan(
        device, q.element_size(), head_dim, kv_index is not None, heads * batch, num_q, num_k, config, splits
    )
    bias_stride = 0 if key_bias is None else key_bias.stride(0)
    k_desc = v_desc = bias_desc = None
    if config.tma and kv_index is None and num_k > 0:
        shape, block = [entries, heads_k, rows_k, head_dim], [1, 1, config.block_n, block_d]
        k_desc = _descriptor(k, shape, [stride_kb, stride_kh, stride_kn, 1], block)
        v_desc = _descriptor(v, shape, [stride_vb, stride_vh, stride_vn, 1], block)
        if k_desc is None or v_desc is None:
            k_desc = v_desc = None
        elif key_bias is not None and not packed:
            # In the packed layout a sequence may start off the 16 B grid.
            bias_desc = _descriptor(key_bias, [entries, rows_k], [bias_stride, 1], [1, config.block_n])

    # Where keys are split, the parts' sums of weights take the place of lse.
    target, target_lse, target_index, part_top = out4, lse3, out_index, None
    split_stride = split_lse_stride = 0
    if splits > 1:
        target = torch.empty((splits, *lse3.shape[::2], heads, head_dim), dtype=torch.float32, device=device)
        target_lse, part_top = torch.empty((2, splits, *lse3.shape), dtype=torch.float32, device=device)
        split_stride, split_lse_stride = target.stride(0), target_lse.stride(0)
        target_index = None
    if packed:
        # Rows that no sequence covers belong to no tile.
        if splits > 1:
            target_lse.zero_()
        else:
            out.zero_()
            lse.fill_(float("-inf"))
    stride_ob, stride_on, stride_oh, _ = target.stride()[-4:]
    stride_lb, stride_lh, _ = target_lse.stride()[-3:]
    with _on_device(device):
        _attn_kernel[(num_tiles * splits * heads * batch,)](
            q, k, v, k_desc, v_desc, bias_desc, key_bias, q_index, kv_index, target_index,
            q_lens, kv_lens, cu_seqlens_q, cu_seqlens_k, target, target_lse, part_top, abs(scale),
            stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
            bias_stride, 0 if q_index is None else q_index.stride(0), 0 if kv_index is None else kv_index.stride(0),
            0 if target_index is None else target_index.stride(0),
            stride_ob, stride_on, stride_oh, split_stride, stride_lb, stride_lh, split_lse_stride,
            heads, heads // heads_k, num_tiles, num_q, num_k, rows_q, rows_k, target.shape[-3],
            HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            SPLITS=splits, NEGATE=scale < 0, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        if splits > 1:
            block_r = 16
            num_rows = lse3.shape[2]
            row_tiles = -(-num_rows // block_r)
            _combine_kernel[(row_tiles * heads * lse3.shape[0],)](
                target, target_lse, part_top, out_index, out4, lse3,
                stride_ob, stride_on, stride_oh, split_stride, stride_lb, stride_lh, split_lse_stride,
                0 if out_index is None else out_index.stride(0), *out4.stride()[:3], *lse3.stride()[:2],
                heads, row_tiles, num_rows, out4.shape[1],
                HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_R=block_r, SPLITS=splits, num_warps=4,
            )  # fmt: skip
    return lse


def mixed_res_attn(
    q, k, v, key_bias, q_index, kv_index, q_lens, kv_lens,
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale,
):  # fmt: skip
    """Launch the attention. Returns out [B, Nq, H, D] (packed: [Tq, H, D]) and lse fp32 [B, H, Nq] ([H, Tq])."""
    shape = q.shape if q_index is None else (*q_index.shape, *q.shape[2:])
    out = torch.empty(shape, dtype=q.dtype, device=q.device)
    lse = _launch(
        out, None, q, k, v, key_bias, q_index, kv_index, q_lens, kv_lens,
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale,
    )  # fmt: skip
    return out, lse


def mixed_res_attn_scatter_(
    out, q, k, v, out_index, key_bias, q_index, kv_index, q_lens, kv_lens,
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale,
):  # fmt: skip
    """Launch the attention with row i written to out[b, out_index[b, i]]. Returns lse fp32 [B, H, Nq]."""
    return _launch(
        out, out_index, q, k, v, key_bias, q_index, kv_index, q_lens, kv_lens,
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale,
    )  # fmt: skip
