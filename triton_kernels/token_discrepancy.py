# SPDX-License-Identifier: Apache-2.0
"""Per-token discrepancy of two feature tensors: one launch, one pass over each input."""

import torch
import triton
import triton.language as tl

_EPS = 1e-6


@triton.jit
def _token_discrepancy_kernel(
    draft,
    source,
    score,
    grid_h,
    grid_w,
    width,
    draft_sb,
    draft_sc,
    draft_sh,
    draft_sw,
    source_sb,
    source_sc,
    source_sh,
    source_sw,
    EPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    CELL_H: tl.constexpr,  # pixels of a cell
    CELL_W: tl.constexpr,
    CELLS: tl.constexpr,  # cells of one grid row, side by side
    BLOCK_H: tl.constexpr,  # pixel rows of a cell taken at a time
    BLOCK_W: tl.constexpr,  # pixel columns of a cell taken at a time
    BLOCK_C: tl.constexpr,
    BATCH: tl.constexpr,  # channel blocks whose loads are issued together
    EVEN_PIXELS: tl.constexpr,
):
    strips = tl.cdiv(grid_w, CELLS)
    pid = tl.program_id(0)
    first_cell = (pid % strips) * CELLS
    grid_row = (pid // strips) % grid_h
    b = (pid // (strips * grid_h)).to(tl.int64)

    # The pixels of neighbouring cells are one contiguous run where a block spans the cell's width.
    WHOLE_W: tl.constexpr = BLOCK_W == CELL_W
    EVEN_C: tl.constexpr = CHANNELS % (BLOCK_C * BATCH) == 0
    COLUMNS: tl.constexpr = CELLS * BLOCK_W
    PIXELS: tl.constexpr = BLOCK_H * COLUMNS
    pixel = tl.arange(0, PIXELS)
    column = pixel % COLUMNS
    block_y = pixel // COLUMNS
    channel = tl.arange(0, BLOCK_C)
    total = tl.zeros([PIXELS], dtype=tl.float32)

    for y0 in range(0, CELL_H, BLOCK_H):
        for x0 in range(0, CELL_W, BLOCK_W):
            cell_y = y0 + block_y
            y = grid_row * CELL_H + cell_y
            if WHOLE_W:
                x = first_cell * BLOCK_W + column
                inside = x < width
            else:
                cell = first_cell + column // BLOCK_W
                cell_x = x0 + column % BLOCK_W
                x = cell * CELL_W + cell_x
                inside = (cell < grid_w) & (cell_x < CELL_W)
            inside = inside & (cell_y < CELL_H)
            draft_pixel = draft + b * draft_sb + y.to(tl.int64) * draft_sh + x.to(tl.int64) * draft_sw
            source_pixel = source + b * source_sb + y.to(tl.int64) * source_sh + x.to(tl.int64) * source_sw

            dd = tl.zeros([PIXELS, BLOCK_C], dtype=tl.float32)
            ss = tl.zeros([PIXELS, BLOCK_C], dtype=tl.float32)
            ds = tl.zeros([PIXELS, BLOCK_C], dtype=tl.float32)
            for c0 in range(0, CHANNELS, BLOCK_C * BATCH):
                # All loads of a batch come before the first use, so that they are in flight together.
                pairs = ()
                for i in tl.static_range(BATCH):
                    c = (c0 + i * BLOCK_C + channel).to(tl.int64)
                    draft_at = draft_pixel[:, None] + (c * draft_sc)[None, :]
                    source_at = source_pixel[:, None] + (c * source_sc)[None, :]
                    if EVEN_C and EVEN_PIXELS:
                        pairs = pairs + (tl.load(draft_at), tl.load(source_at))
                    else:
                        if EVEN_C:
                            mask = inside[:, None]
                        elif EVEN_PIXELS:
                            mask = (c < CHANNELS)[None, :]
                        else:
                            mask = inside[:, None] & (c < CHANNELS)[None, :]
                        pairs = pairs + (tl.load(draft_at, mask, 0.0), tl.load(source_at, mask, 0.0))
                for i in tl.static_range(BATCH):
                    d = pairs[2 * i].to(tl.float32)
                    s = pairs[2 * i + 1].to(tl.float32)
                    dd += d * d
                    ss += s * s
                    ds += d * s

            # ||d/m_d - s/m_s||^2 from the three sums, m = max(||.||, EPS). Equal inputs give three equal quotients,
            # hence exactly 0. The comparisons are written so that NaN passes through.
            dd_sum = tl.sum(dd, axis=1)
            ss_sum = tl.sum(ss, axis=1)
            ds_sum = tl.sum(ds, axis=1)
            d_norm = tl.sqrt_rn(dd_sum)
            s_norm = tl.sqrt_rn(ss_sum)
            d_norm = tl.where(d_norm < EPS, EPS, d_norm)
            s_norm = tl.where(s_norm < EPS, EPS, s_norm)
            value = (
                tl.div_rn(dd_sum, d_norm * d_norm)
                + tl.div_rn(ss_sum, s_norm * s_norm)
                - 2.0 * tl.div_rn(ds_sum, d_norm * s_norm)
            )
            value = tl.where(value < 0.0, 0.0, value)
            value = tl.where(value > 4.0, 4.0, value)
            # A masked pixel was read as two zero vectors and adds 0.
            total += value

    cells_total = tl.sum(tl.sum(tl.reshape(total, [BLOCK_H, CELLS, BLOCK_W]), axis=2), axis=0)
    cell = first_cell + tl.arange(0, CELLS)
    cells = tl.program_id(0).to(tl.int64) // strips * grid_w + cell
    tl.store(score + cells, cells_total / (CELL_H * CELL_W), mask=cell < grid_w)


def _as_map(x, grid_h, grid_w):
    """(sizes, strides) of ``x`` as [B, C, H, W]; token features [B, N, C] become one row of N pixels."""
    if x.dim() == 3:
        b, n, c = x.shape
        sb, sn, sc = x.stride()
        return (b, c, 1, n), (sb, sc, 0, sn), (1, n)
    return tuple(x.shape), x.stride(), (grid_h, grid_w)


def _blocks(element_size, channels, cell_h, cell_w, rows, columns, channels_last):
    """Tile of one program: (CELLS, BLOCK_H, BLOCK_W, BLOCK_C, BATCH, num_warps).

    A thread's share of a tile is a 16-byte vector of each input, and BATCH tiles are loaded together: about 64 KB in
    flight on each SM. Lanes run along the contiguous dimension.
    """
    vector = 16 // element_size
    if channels_last:
        # One warp to a pixel: no exchange between warps until the pixels are summed.
        warps = 4
        block_c = min(triton.next_power_of_2(channels), 32 * vector)
        pixels = warps * 32 * vector // block_c
    else:
        # 128 bytes along a pixel row: whole cache lines.
        run = 128 // element_size
        pixels = run * min(triton.next_power_of_2(cell_h), 4)
        # Few programs must each keep more in flight.
        warps = 16 if rows * columns * cell_w < 256 * run else 8
        block_c = min(triton.next_power_of_2(channels), max(1, warps * 32 * vector // pixels))
    block_w = min(triton.next_power_of_2(cell_w), pixels)
    block_h = min(triton.next_power_of_2(cell_h), pixels // block_w)
    cells = min(pixels // (block_w * block_h), triton.next_power_of_2(columns))
    batch = min(triton.next_power_of_2(triton.cdiv(channels, block_c)), 4)
    return cells, block_h, block_w, block_c, batch, warps


def token_discrepancy(draft, source, grid_h, grid_w):
    """Mean over each cell's pixels of ||d/max(||d||, 1e-6) - s/max(||s||, 1e-6)||^2 over channels.

    draft, source: [B, C, H, W] or [B, N, C], bf16, fp16 or fp32, any strides. Returns fp32 [B, grid_h * grid_w].
    Sums are fp32: a score near 0 is exact to about 1e-6, and channel norms above 1.8e19 overflow to NaN.
    """
    score = torch.empty((draft.shape[0], grid_h * grid_w), dtype=torch.float32, device=draft.device)
    if score.numel() == 0:
        return score
    (batch, channels, height, width), draft_strides, (rows, columns) = _as_map(draft, grid_h, grid_w)
    source_strides = _as_map(source, grid_h, grid_w)[1]
    cell_h, cell_w = height // rows, width // columns
    channels_last = draft_strides[1] == 1 and source_strides[1] == 1
    cells, block_h, block_w, block_c, loads, warps = _blocks(
        draft.element_size(), channels, cell_h, cell_w, batch * rows, columns, channels_last
    )
    with torch.cuda.device_of(draft):
        _token_discrepancy_kernel[(batch * rows * triton.cdiv(columns, cells),)](
            draft,
            source,
            score,
            rows,
            columns,
            width,
            *draft_strides,
            *source_strides,
            EPS=_EPS,
            CHANNELS=channels,
            CELL_H=cell_h,
            CELL_W=cell_w,
            CELLS=cells,
            BLOCK_H=block_h,
            BLOCK_W=block_w,
            BLOCK_C=block_c,
            BATCH=loads,
            EVEN_PIXELS=columns % cells == 0 and cell_h % block_h == 0 and cell_w % block_w == 0,
            num_warps=warps,
        )
    return score
