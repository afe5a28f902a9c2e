# SPDX-License-Identifier: Apache-2.0
"""Low-rank changes of a module's linear layers: added for training, saved by themselves, merged into a copy."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


class LowRankLinear(torch.nn.Linear):
    """A linear layer of weight + up @ down. down: [rank, in], random; up: [out, rank], zero at first.

    One class for all layers, with the product computed in each call: a compiled block then serves every block like it.
    """

    def __init__(self, layer: torch.nn.Linear, rank: int):
        out, inner = layer.weight.shape
        super().__init__(inner, out, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        device = layer.weight.device
        self.down = torch.nn.Parameter(torch.randn(rank, inner, dtype=torch.float32, device=device) / inner**0.5)
        self.up = torch.nn.Parameter(torch.zeros(out, rank, dtype=torch.float32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + (self.up @ self.down).to(self.weight.dtype), self.bias)


def add_low_rank(module: torch.nn.Module, rank: int) -> list[torch.nn.Parameter]:
    """Give each linear layer of a module a trainable change of a rank, or of its smaller side where that is less; all
    else is frozen. Returns what is trained."""
    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    module.requires_grad_(False)
    trained = []
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, torch.nn.Linear):
                changed = LowRankLinear(layer, min(rank, *layer.weight.shape))
                setattr(parent, name, changed)
                trained += [changed.down, changed.up]
    return trained


def low_rank_state(module: torch.nn.Module) -> dict[str, Tensor]:
    """The changes of a module: {layer}.down and {layer}.up."""
    layers = [(name, x) for name, x in module.named_modules() if isinstance(x, LowRankLinear)]
    return {f"{name}.{part}": getattr(layer, part).detach() for name, layer in layers for part in ("down", "up")}


def save_low_rank(state: dict[str, Tensor], path: str | Path) -> None:
    """Write changes to a safetensors file, in bf16."""
    save_file({name: x.to("cpu", torch.bfloat16).contiguous() for name, x in state.items()}, path)


@torch.no_grad()
def merged_copy(module: torch.nn.Module, path: str | Path) -> torch.nn.Module:
    """A copy of a module with the changes of a file merged into its weights.

    ValueError where the file names a layer that the module does not have, or has in another shape.
    """
    merged = copy.deepcopy(module)
    layers = dict(merged.named_modules())
    with safe_open(path, "pt") as file:
        names = sorted({key.rpartition(".")[0] for key in file.keys()})
        for name in names:
            weight = getattr(layers.get(name), "weight", None)
            down, up = (file.get_tensor(f"{name}.{part}").float() for part in ("down", "up"))
            if weight is None or weight.shape != (up.shape[0], down.shape[1]):
                got = "none" if weight is None else tuple(weight.shape)
                raise ValueError(f"{path}: expected a layer {name} of {(up.shape[0], down.shape[1])}, got {got}")
            weight.copy_(weight.float() + (up @ down).to(weight.device))
    return merged
