# SPDX-License-Identifier: Apache-2.0
"""Export a transformer block with our ops and compile it ahead of time, for a C++ program without Python (main.cpp).

    python examples/aoti/export.py OUT [--device cuda]

The block is one of a mixed-resolution step over kept keys and values: it computes the N fresh tokens of a picture and
writes their keys and values to their rows of two buffers of all S tokens, in which the others' are from a step before.
N, S and the batch are dynamic. OUT/block.pt2 is the package, OUT/cases.pt inputs and this process's results.
"""

import argparse
from pathlib import Path

import torch
from torch.export import Dim

from specedit_kernels import ops


class Block(torch.nn.Module):
    def __init__(self, heads: int, dim: int):
        super().__init__()
        self.heads, self.width = heads, heads * dim
        self.norm = torch.nn.LayerNorm(self.width, elementwise_affine=False)
        self.qkv = torch.nn.Linear(self.width, 3 * self.width)
        self.norm_q, self.norm_k = (torch.nn.Parameter(1 + 0.1 * torch.randn(dim)) for _ in range(2))
        self.out = torch.nn.Linear(self.width, self.width)

    def forward(self, x, keys, values, rows, key_bias, cos, sin):
        """x [B, N, C]; keys, values [B, S, H, D], written; rows int32 [B, N]; key_bias [B, S]; cos, sin [1, N, D/2]."""
        q_new, k_new, v_new = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q = torch.empty_like(q_new)
        ops.qk_norm_rope_scatter_(
            q, keys, values, q_new, k_new, v_new, cos, sin, q_weight=self.norm_q, k_weight=self.norm_k,
            kv_out_index=rows,
        )  # fmt: skip
        attended, _ = ops.mixed_res_attn(q, keys, values, key_bias=key_bias)
        return x + self.out(attended.flatten(2))


def case(batch: int, fresh: int, tokens: int, heads: int, dim: int, device: str, dtype: torch.dtype):
    """Inputs of a step: `fresh` of `tokens` rows are computed, half of the others stand for four tokens each."""

    def normal(*shape):
        return torch.randn(shape).to(device, dtype)

    order = torch.stack([torch.randperm(tokens) for _ in range(batch)])[:, :fresh].sort(dim=1).values
    bias = torch.where(torch.rand(batch, tokens) < 0.5, 4.0, 1.0).log().scatter(1, order, 0.0)
    angle = torch.rand(1, fresh, dim // 2) * 6
    kept = (normal(batch, tokens, heads, dim) for _ in range(2))
    return (normal(batch, fresh, heads * dim), *kept, order.int().to(device), bias.to(device),
            angle.cos().to(device), angle.sin().to(device))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Export and compile a block with specedit's ops.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    device, (heads, dim) = arguments.device, (4, 64)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    block = Block(heads, dim).to(device, dtype).requires_grad_(False).eval()
    batch, fresh, tokens = Dim("batch", max=64), Dim("fresh", min=2, max=65536), Dim("tokens", min=2, max=65536)
    shapes = ({0: batch, 1: fresh}, {0: batch, 1: tokens}, {0: batch, 1: tokens}, {0: batch, 1: fresh},
              {0: batch, 1: tokens}, {1: fresh}, {1: fresh})  # fmt: skip
    example = case(2, 24, 96, heads, dim, device, dtype)
    with torch.no_grad():
        program = torch.export.export(block, example, dynamic_shapes=shapes)
    torch._inductor.aoti_compile_and_package(program, package_path=str(arguments.out / "block.pt2"))
    cases = []
    for sizes in ((2, 24, 96), (1, 7, 40), (3, 130, 515), (1, 64, 64)):
        inputs = case(*sizes, heads, dim, device, dtype)
        given = [x.clone() for x in inputs]
        with torch.no_grad():
            result = block(*inputs)
        # inputs as given; the result; the keys and values that were written
        cases.append([*given, result, inputs[1], inputs[2]])
    torch.save([[x.cpu() for x in found] for found in cases], arguments.out / "cases.pt")
    print(f"{arguments.out / 'block.pt2'}: {device}, {len(cases)} cases")


if __name__ == "__main__":
    main()
