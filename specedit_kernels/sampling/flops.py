# SPDX-License-Identifier: Apache-2.0
"""Useful floating-point operations of one transformer step (a multiply and an add count as two)."""

from __future__ import annotations


def transformer_flops(queries: int, keys: int, dim: int, blocks: int) -> int:
    """FLOPs of one pass over a transformer of FLUX's or Qwen-Image's type.

    Per block 24 d^2 for each token (attention projections 8 d^2, MLP 16 d^2; double- and single-stream blocks alike)
    and 4 d for each query-key pair. Embedders, norms and the VAE are left out. For FLUX.1-Kontext (57 blocks, d = 3072,
    8704 tokens) this gives 165.4 TFLOP, as the published 8299.54 TFLOP over 50 steps do within 0.4 %.
    """
    return blocks * (24 * dim * dim * queries + 4 * dim * queries * keys)
