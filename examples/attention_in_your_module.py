# SPDX-License-Identifier: Apache-2.0
"""torch.ops.specedit.mixed_res_attn in a module of one's own, under torch.compile(fullgraph=True).

    python examples/attention_in_your_module.py

A sequence holds fine tokens and coarse ones. A coarse token stands for four fine ones, so its key gets the bias log(4).
Only the active tokens are queries; all tokens are keys.
"""

import math

import torch
from torch import nn

import specedit_kernels  # noqa: F401  registers torch.ops.specedit


class ActiveAttention(nn.Module):
    """Self-attention that updates the rows of x that `active` names, over the keys of all rows."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor, active: torch.Tensor, multiplicity: torch.Tensor) -> torch.Tensor:
        """x: [B, N, C]; active: int32 [B, n], rows, -1 = empty slot; multiplicity: [B, N], fine tokens of each row."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in self.qkv(x).chunk(3, -1))
        attended, _ = torch.ops.specedit.mixed_res_attn(q, k, v, key_bias=multiplicity.log(), q_index=active)
        x = x.clone()
        gate = x.new_ones(x.shape[0], x.shape[2])
        torch.ops.specedit.gated_residual_add_(x, self.out(attended.flatten(2)), gate, index=active)
        return x


def expected(module, x, active, multiplicity):
    """The same by PyTorch alone: all rows are queries, then the active ones are kept."""
    q, k, v = (t.unflatten(-1, (module.heads, -1)).transpose(1, 2) for t in module.qkv(x).chunk(3, -1))
    attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=multiplicity.log()[:, None, None])
    updated = x + module.out(attended.transpose(1, 2).flatten(2))
    is_active = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    for row, index in zip(is_active, active):
        row[index[index >= 0].long()] = True
    return torch.where(is_active[..., None], updated, x)


@torch.no_grad()
def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    module = ActiveAttention(channels=256, heads=4).to(device)
    x = torch.randn(2, 96, 256, device=device)
    multiplicity = torch.ones(2, 96, device=device)
    multiplicity[:, 64:] = 4  # the last 32 rows are coarse tokens
    active = torch.full((2, 24), -1, dtype=torch.int32, device=device)
    active[0, :24] = torch.arange(24)
    active[1, :10] = torch.arange(20, 30)  # samples may have different numbers of active tokens

    compiled = torch.compile(module, fullgraph=True)
    error = (compiled(x, active, multiplicity) - expected(module, x, active, multiplicity)).abs().max().item()
    print(f"{device}: largest difference from PyTorch {error:.1e}; key bias of a coarse token {math.log(4):.3f}")
    assert error < (1e-4 if device == "cpu" else 1e-2)


if __name__ == "__main__":
    main()
