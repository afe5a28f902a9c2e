# SPDX-License-Identifier: Apache-2.0
"""Which work tiles, waves and splits the CUDA C++ attention kernel makes of a call: `specedit doctor --plan 922x8704`.

The plan comes from the kernel's own tile scheduler (csrc/mixed_res_attn/plan.h, tile_scheduler.cuh), which the optional
module ``specedit_kernels._planner`` binds. It needs no GPU.
"""

import importlib
import re

import torch

# Both models' attention, and the SMs of an H100 or H200.
_HEADS = 24
_HEAD_DIM = 128
_NUM_SMS = 132


def _planner():
    try:
        planner = importlib.import_module("._planner", __package__)
    except ImportError as error:
        raise RuntimeError(
            "the planner is not built: it needs Linux, a C++ compiler, pybind11 and ninja when specedit-kernels is "
            f"installed (pip install --no-build-isolation -e .): {error}"
        ) from None
    if not hasattr(planner, "tile"):
        raise RuntimeError(f"the planner is another version's build: build it again ({planner.__file__})")
    return planner


def _parse(text):
    match = re.fullmatch(r"(\d+)x(\d+)(?:x(\d+))?(?:x(\d+))?", text.strip().lower())
    if match is None:
        raise ValueError(f"expected QUERIESxKEYS, such as 922x8704, or QUERIESxKEYSxHEADSxHEAD_DIM, got {text!r}")
    queries, keys, heads, head_dim = match.groups()
    return int(queries), int(keys), int(heads or _HEADS), int(head_dim or _HEAD_DIM)


def _num_sms():
    if not torch.cuda.is_available():
        return _NUM_SMS
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def _span(values, unit):
    low, high = min(values), max(values)
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"


def describe(text, num_sms=None):
    """The plan of one attention call, as lines of text.

    Args:
        text: "QUERIESxKEYS", such as "922x8704", or "QUERIESxKEYSxHEADSxHEAD_DIM"; 24 heads of 128 by default. The
            lengths are those of one batch entry, known on the host (no q_lens, kv_lens or cu_seqlens). No kv_index.
        num_sms: SMs, one CTA each. None: those of the current CUDA device, 132 (H100, H200) without one.

    Raises:
        ValueError: text or a number in it is not as described.
        RuntimeError: the module specedit_kernels._planner is not built, or is another version's.
    """
    queries, keys, heads, head_dim = _parse(text)
    planner = _planner()
    plan = planner.plan(queries, keys, heads, head_dim, num_sms or _num_sms())
    m_blocks = plan.num_tiles // heads
    tile_q, tile_k = planner.tile(head_dim)
    n_blocks = -(-keys // tile_k)
    lines = [
        f"mixed_res_attn: {queries} queries, {keys} keys, {heads} heads of {head_dim}, {plan.num_sms} SMs",
        f"work tiles  {plan.num_tiles}: {m_blocks} of {tile_q} queries for each of {heads} heads; "
        f"{n_blocks} K tiles of {tile_k} keys in each",
    ]
    last = plan.last_wave_tiles
    if last == 0:
        lines.append(f"waves       {plan.full_waves} full: the last wave is 100 % full")
        return "\n".join([*lines, "splits      none: no wave is partial"])
    lines.append(
        f"waves       {plan.full_waves} full, and a last partial wave of {last} tiles: "
        f"{100 * last / plan.num_sms:.0f} % full without splits"
    )
    if plan.split_tiles == 0:
        return "\n".join([*lines, "splits      none: the combine kernel would cost more than they save"])
    blocks = [0] * plan.num_sms  # K tiles of a CTA in the last partial wave
    splits: dict[tuple[int, int], int] = {}
    costs = [0] * plan.num_sms
    for work in plan.work:
        costs[work.cta] += work.cost
        if work.wave == plan.full_waves:
            blocks[work.cta] += work.n_block_end - work.n_block_begin
        if work.split >= 0:
            splits[work.head, work.m_block] = splits.get((work.head, work.m_block), 0) + 1
    lines.append(
        f"splits      {sum(splits.values())}, of {len(splits)} tiles: {_span(splits.values(), 'splits')} in each; "
        "a second kernel combines them"
    )
    lines.append(f"last wave   {_span(blocks, 'K tiles')} for each CTA, instead of {n_blocks} for {last} of the CTAs")
    lines.append(
        f"all waves   CTAs are busy for {100 * sum(costs) / (plan.num_sms * max(costs)):.0f} % of the longest's time "
        "(by the planner's cost model)"
    )
    return "\n".join(lines)
