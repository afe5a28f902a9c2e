# SPDX-License-Identifier: Apache-2.0
"""Low-rank changes of a module's linear layers: added for training, saved by themselves, merged into a copy."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils import parametrize


class LowRank(torch.nn.Module):
    """weight -> weight + up @ down. weight: [out, in]; down: [rank, in], random; up: [out, rank], zero at first."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        out, inner = weight.shape
        self.down = torch.nn.Parameter(torch.randn(rank, inner, device=weight.device) / inner**0.5)
        self.up = torch.nn.Parameter(torch.zeros(out, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).to(weight.dtype)


def add_low_rank(module: torch.nn.Module, rank: int) -> list[torch.nn.Parameter]:
    """Give each linear layer of a module a trainable low-rank change; all else is frozen. Returns what is trained.

    Layers whose smaller side is no larger than the rank are left as they are.
    """
    module.requires_grad_(False)
    trained = []
    for layer in list(module.modules()):
        if isinstance(layer, torch.nn.Linear) and min(layer.weight.shape) > rank:
            change = LowRank(layer.weight, rank)
            parametrize.register_parametrization(layer, "weight", change)
            trained += [change.down, change.up]
    if not trained:
        raise ValueError(f"rank: expected one below a side of some linear layer, got {rank}")
    return trained


def low_rank_state(module: torch.nn.Module) -> dict[str, Tensor]:
    """The changes of a module: {layer}.down and {layer}.up."""
    state = {}
    for name, layer in module.named_modules():
        if parametrize.is_parametrized(layer, "weight"):
            for part in ("down", "up"):
                state[f"{name}.{part}"] = getattr(layer.parametrizations.weight[0], part).detach()
    return state


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
