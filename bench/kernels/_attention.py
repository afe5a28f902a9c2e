# SPDX-License-Identifier: Apache-2.0
"""Inputs, float64 check and library baselines of the attention benchmarks."""

import os

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# (queries, keys): the whole of a 1024² Kontext edit, then what a SpecEdit step leaves of it.
SHAPES = ((8704, 8704), (4608, 4608), (1536, 8704), (922, 8704), (922, 5120), (512, 8704), (1536, 1536))
HEADS, HEAD_DIM = 24, 128


def inputs(num_q, num_k, dtype=torch.bfloat16, heads=HEADS, head_dim=HEAD_DIM, seed=0):
    """q [1, num_q, heads, head_dim], k and v alike, and key_bias [1, num_k]: log 4 on every other key, else 0."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    q, k, v = (
        torch.randn(1, n, heads, head_dim, device="cuda", dtype=dtype, generator=generator)
        for n in (num_q, num_k, num_k)
    )
    bias = torch.zeros(1, num_k, device="cuda")
    bias[:, ::2] = torch.tensor(4.0).log()
    return q, k, v, bias


def flops(num_q, num_k, heads=HEADS, head_dim=HEAD_DIM):
    return 4 * heads * head_dim * num_q * num_k


class Check:
    """Relative RMS error on a sample of queries against float64, with the error of plain bf16 math as the budget."""

    def __init__(self, q, k, v, bias=None, rows=64):
        self.rows = torch.linspace(0, q.shape[1] - 1, rows, device=q.device).long().unique()
        # One head at a time: float64 scores of all would not be small.
        exact, plain, lse = [], [], []
        for h in range(q.shape[2]):
            kv_h = h * k.shape[2] // q.shape[2]
            qh, kh, vh = q[:, self.rows, h], k[:, :, kv_h], v[:, :, kv_h]
            for out, dtype in ((exact, torch.float64), (plain, q.dtype)):
                scores = qh.to(dtype) @ kh.to(dtype).mT * q.shape[-1] ** -0.5
                if bias is not None:
                    scores = scores + bias[:, None, :].to(dtype)
                if dtype == torch.float64:
                    lse.append(scores.logsumexp(-1))
                out.append(scores.softmax(-1) @ vh.to(dtype))
        self.exact, self.lse = torch.stack(exact, 2), torch.stack(lse, 1)
        self.budget = self._error(torch.stack(plain, 2)) + torch.finfo(q.dtype).eps / 2

    def _error(self, sample):
        return ((sample.double() - self.exact).norm() / self.exact.norm()).item()

    def __call__(self, out, lse=None):
        """(relative RMS error, whether it is within the budget). out: [1, Nq, H, D]; lse: [1, H, Nq] or None."""
        error = self._error(out[:, self.rows])
        ok = error <= self.budget
        if lse is not None:
            ok = ok and (lse[:, :, self.rows].double() - self.lse).abs().max().item() < 1e-4
        return error, ok


def forced(backend, fn):
    """`fn` with attention served by ``backend``; a CUDA graph keeps what was chosen at its capture."""

    def call():
        before = os.environ.get("SPECEDIT_BACKEND")
        os.environ["SPECEDIT_BACKEND"] = f"mixed_res_attn={backend},mixed_res_attn_scatter_={backend}"
        try:
            return fn()
        finally:
            os.environ.pop("SPECEDIT_BACKEND")
            if before is not None:
                os.environ["SPECEDIT_BACKEND"] = before

    return call


def baselines(q, k, v, bias):
    """{name: (callable that returns out [1, Nq, H, D], whether it adds the bias)} of what can be imported here."""
    qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
    table = {"flex + bias": (_flex(qt, kt, vt, bias[0]), True)}

    def cudnn(mask):
        def run():
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return F.scaled_dot_product_attention(qt, kt, vt, attn_mask=mask).transpose(1, 2)

        return run

    # cuDNN misreads a float32 mask beside bf16 inputs, so the mask takes their dtype.
    table["cudnn + bias"] = (cudnn(bias.to(q.dtype)[:, None, None, :].expand(-1, 1, q.shape[1], -1)), True)
    table["cudnn"] = (cudnn(None), False)
    flash = fa3()
    if flash is not None:
        table["fa3"] = (lambda: flash(q, k, v), False)
        table["fa3, 2 splits"] = (lambda: flash(q, k, v, num_splits=2), False)
    return table


def fa3():
    """FlashAttention-3 of q, k, v [B, N, H, D] where fa3-fwd is installed, else None."""
    try:
        from fa3_fwd_interface import flash_attn_func
    except ImportError:
        return None

    def attend(*args, **kwargs):
        out = flash_attn_func(*args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    return attend


def _flex(qt, kt, vt, bias):
    from torch.nn.attention.flex_attention import flex_attention

    def add_bias(score, b, h, q_index, k_index):
        return score + bias[k_index]

    torch._dynamo.reset()  # one specialised kernel a shape
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return lambda: compiled(qt, kt, vt, score_mod=add_bias).transpose(1, 2)
