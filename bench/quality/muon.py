# SPDX-License-Identifier: Apache-2.0
"""Muon: momentum whose matrices are orthogonalised by a Newton-Schulz iteration (Jordan et al., 2024)."""

import torch

QUINTIC = (3.4445, -4.7750, 2.0315)  # coefficients of the published iteration


def orthogonalise(g, steps=5):
    """[k, rows, columns] -> the same shape with singular values near 1, in bf16."""
    a, b, c = QUINTIC
    x = g.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.float().norm(dim=(1, 2), keepdim=True).bfloat16() + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For matrices only. Equal shapes are iterated as one batch. The update's RMS is 0.2 lr, as AdamW's would be."""

    def __init__(self, params, lr=2e-3, momentum=0.95):
        params = list(params)
        for p in params:
            if p.ndim != 2:
                raise ValueError(f"params: Muon takes matrices, got one of shape {tuple(p.shape)}")
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(tuple(p.shape), []).append(p)
            for (rows, columns), params in shapes.items():
                buffers = []
                for p in params:
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                    buffers.append(self.state[p]["momentum_buffer"])
                grads = [p.grad for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                ahead = torch._foreach_lerp(grads, buffers, group["momentum"])  # Nesterov
                update = orthogonalise(torch.stack(ahead)).to(params[0].dtype)
                scale = 0.2 * max(rows, columns) ** 0.5
                torch._foreach_add_(params, list(update.unbind()), alpha=-group["lr"] * scale)
