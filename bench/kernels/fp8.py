# SPDX-License-Identifier: Apache-2.0
"""fp8 beside bf16 on one GPU: quantisation, weights kept in 8 bits, linear layers, attention, an active step of
FLUX.1-Kontext.

    python bench/kernels/fp8.py --out runs/fp8                     # all parts; compute capability 8.9 or later
    python bench/kernels/fp8.py --out runs/fp8 --parts linears attention

Each part is a list of cases; in a case rows are timed in turn (CUDA graphs, µs of the device) after each was held
against float64. A row or a case that fails is written down as failed, and the rest goes on. OUT/fp8.json is whole after
every case. An error is ||result - exact|| / ||exact|| on sampled rows; "exact" are bf16 inputs in float64, "of its
factors" the rounded ones, which leaves the error of the product alone.
"""

import argparse
import itertools
import json
import math
import sys
import traceback
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from _attention import Check, fa3, flops, inputs
from _timing import environment, interleaved_us

from specedit_kernels import ops
from specedit_kernels._gguf import BLOCKS
from specedit_kernels._panels import in_panels, of_panels
from specedit_kernels.reference.mixed_res_attn_fp8 import dequantised
from specedit_kernels.reference.quantize_fp8 import before_rounding

E4M3 = torch.float8_e4m3fn
OP = "mixed_res_attn_fp8"
ROWS = (922, 2560, 8704)
LAYERS = ((3072, 9216), (3072, 21504), (3072, 12288), (15360, 3072))
ATTENTION = ((8704, 8704, 128), (4608, 4608, 128), (922, 8704, 128), (2560, 2560, 128), (512, 8704, 128),
             (256, 8704, 128), (4608, 4608, 64))  # fmt: skip
SAMPLED = 128
# Rows of a prompt, and of a line of a picture, in a sequence whose keys and values are kept.
PROMPT, WIDTH = 512, 64


def normal(*shape, scale=1.0):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * scale


def error(result, exact):
    return ((result.double() - exact).norm() / exact.norm()).item()


def timed(fns, checks, **facts):
    """{"rows": {name: {"us", "error", ...}}} of {name: callable}; checks: {name: result -> {...}}."""
    rows, good = {}, {}
    for name, fn in fns.items():
        try:
            result = fn()
            torch.cuda.synchronize()
            rows[name] = checks[name](result) if name in checks else {}
            good[name] = fn
        except Exception as problem:
            rows[name] = {"failed": f"{type(problem).__name__}: {problem}"[:500]}
    try:
        for name, us in interleaved_us(good).items():
            rows[name]["us"] = round(us, 2)
    except Exception as problem:
        facts["failed"] = f"{type(problem).__name__}: {problem}"[:500]
    return facts | {"rows": rows}


def quantise(kind, rows):
    channels = 3072 if kind in ("plain", "norm") else 12288
    x = normal(1, rows, channels)
    given = {}
    if kind == "norm":
        given = dict(scale=normal(1, channels), shift=normal(1, channels))
    elif kind != "plain":
        given = dict(gelu=True)
    if kind == "gelu beside":
        given["before"] = normal(1, rows, 3072)
    doubles = {name: y.double() if isinstance(y, torch.Tensor) else y for name, y in given.items()}
    places = torch.linspace(0, rows - 1, SAMPLED, device="cuda").long()
    if "before" in doubles:
        doubles["before"] = doubles["before"][:, places]
    names = ("scale", "shift", "modulation_index", "before", "gelu")
    of_doubles = (doubles.get(n, False if n == "gelu" else None) for n in names)
    exact = before_rounding(x[:, places].double(), *of_doubles, 1e-6)

    def check(result):
        values, scale = result
        return {"error": error(values[:, places].double() * scale[:, places].double(), exact)}

    def eager():
        y = before_rounding(x, *(given.get(n, False if n == "gelu" else None) for n in names), 1e-6)
        scale = y.abs().amax(-1, keepdim=True) / 448
        return (y / scale).to(E4M3), scale

    moved = x.numel() * 3 + rows * 4 + 3 * (given["before"].numel() if "before" in given else 0)
    source = torch.zeros(moved // 2, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    fns = {"copy of as many bytes": lambda: target.copy_(source), "quantize_fp8": lambda: ops.quantize_fp8(x, **given)}
    if kind == "norm":
        fns["adaln_modulate, bf16"] = lambda: ops.adaln_modulate(x, given["scale"], given["shift"])
    if rows == ROWS[0]:  # a compilation takes longer than all the rest
        fns["torch.compile"] = torch.compile(eager, dynamic=False)
    return timed(fns, {"quantize_fp8": check, "torch.compile": check}, bytes=moved)


def linear(rows, into, out):
    x, weight, bias = normal(rows, into), normal(out, into, scale=into**-0.5), normal(out)
    values, scale = ops.quantize_fp8(x)
    w_values, w_scale = ops.quantize_fp8(weight)
    w_scale = w_scale.t().contiguous()
    places = torch.linspace(0, rows - 1, SAMPLED, device="cuda").long()
    exact = x[places].double() @ weight.double().T + bias.double()
    factors = (values[places].double() * scale[places].double()) @ (w_values.double() * w_scale.double().T).T + bias

    def check(result):
        return {"error": error(result[places], exact), "error of its factors": error(result[places], factors)}

    def product(values, scale, fast):
        return torch._scaled_mm(values, w_values.t(), scale, w_scale, bias=bias, out_dtype=torch.bfloat16,
                                use_fast_accum=fast)  # fmt: skip

    one = torch.ones((), device="cuda")
    fns = {
        "bf16": lambda: F.linear(x, weight, bias),
        "fp8, fast accumulation": lambda: product(values, scale, True),
        "fp8": lambda: product(values, scale, False),
        "fp8, one scale": lambda: torch._scaled_mm(values, w_values.t(), one, one, bias=bias, out_dtype=torch.bfloat16,
                                                   use_fast_accum=True),
        "quantize_fp8, fp8, fast accumulation": lambda: product(*ops.quantize_fp8(x), True),
    }  # fmt: skip
    found = timed(fns, {name: check for name in fns if "one scale" not in name})
    for row in found["rows"].values():
        if "us" in row:
            row["tflops"] = round(2 * rows * into * out / row["us"] / 1e6, 1)
    return found


def by_head(x):
    """e4m3 with a scale a head: values, [B, 1, H]."""
    scale = (x.float().abs().amax((1, 3)) / 448)[:, None]
    return (x.float() / scale[..., None]).clamp(-448, 448).to(E4M3), scale


def by_row(x):
    values, scale = ops.quantize_fp8(x)
    return values, scale.squeeze(-1)


class CheckFp8(Check):
    """The error against bf16's factors, and that of the rounded ones, whose budget is the rounding of the weights."""

    def __init__(self, q, k, v, bias, factors):
        super().__init__(q, k, v, bias)
        self.own = Check(*dequantised(*factors, torch.float32), bias)

    def __call__(self, result):
        out, lse = result if isinstance(result, tuple) else (result, None)
        sample = out[:, self.rows]
        own = self.own._error(sample)
        found = {"error": self._error(sample), "error of its factors": own, "error_ok": own < 0.05}
        if lse is not None:
            found["lse"] = (lse[:, :, self.rows].double() - self.own.lse).abs().max().item()
        return found


def attention(num_q, num_k, dim):
    q, k, v, bias = inputs(num_q, num_k, head_dim=dim)
    pairs = {"row": [by_row(x) for x in (q, k, v)], "head": [by_row(q), by_head(k), by_head(v)]}
    factors = {name: (*(x for x, _ in p), *(s for _, s in p)) for name, p in pairs.items()}
    plain, plain_none = Check(q, k, v, bias), Check(q, k, v)
    checks, fns = {}, {}

    def own(name, kind, panels, bias, **more):
        q8, k8, v8, *scales = factors[kind]
        v8 = in_panels(v8) if panels else v8
        fns[name] = lambda: ops.mixed_res_attn_fp8(q8, k8, v8, *scales, key_bias=bias, **more)
        checks[name] = CheckFp8(q, k, v, bias, factors[kind])

    multiplicities = torch.zeros_like(bias)
    multiplicities[:, num_k // 2 :] = math.log(4)
    fns["bf16 + bias"] = lambda: ops.mixed_res_attn(q, k, v, key_bias=bias)
    checks["bf16 + bias"] = lambda r: dict(zip(("error", "error_ok"), plain(*r)))
    fns["bf16"] = lambda: ops.mixed_res_attn(q, k, v)
    checks["bf16"] = lambda r: dict(zip(("error", "error_ok"), plain_none(*r)))
    own("fp8 by row, v as it is, + bias", "row", False, bias)
    own("fp8 by row + bias", "row", True, bias)
    own("fp8 by head + bias", "head", True, bias)
    own("fp8 by head + multiplicities", "head", True, multiplicities)
    own("fp8 by head", "head", True, None)
    own("fp8 by head, v as it is, + bias", "head", False, bias)
    if ops.backend_of(OP)[0] == "cuda":
        for kind in ("head", "row"):
            name = f"fp8 by {kind} + bias, Triton"
            q8, k8, v8, *scales = factors[kind]
            fns[name] = partial(triton_attention().launch, q8, k8, in_panels(v8), *scales, bias, *[None] * 4, dim**-0.5)
            checks[name] = CheckFp8(q, k, v, bias, factors[kind])
    order = torch.randperm(num_k, device="cuda").int()[None]
    q8, k8, v8, *scales = factors["row"]
    fns["fp8 by row + bias, by index"] = partial(
        ops.mixed_res_attn_fp8, q8, k8, v8, *scales, key_bias=bias, kv_index=order
    )
    checks["fp8 by row + bias, by index"] = CheckFp8(q, k, v, bias, factors["row"])
    fns["v into panels, torch"] = lambda: in_panels(v8)
    flash = fa3()
    if flash is not None:
        fns["fa3 bf16"] = lambda: flash(q, k, v)
        checks["fa3 bf16"] = lambda r: dict(zip(("error", "error_ok"), plain_none(r)))
        qh, kh, vh = (by_head(x) for x in (q, k, v))
        descale = {f"{n}_descale": s[:, 0].contiguous() for n, (_, s) in zip("qkv", (qh, kh, vh))}
        fns["fa3 fp8"] = lambda: flash(qh[0], kh[0], vh[0], **descale)
        checks["fa3 fp8"] = CheckFp8(q, k, v, None, (qh[0], kh[0], vh[0], qh[1], kh[1], vh[1]))
    found = timed(fns, checks, backend=ops.backend_of(OP)[0])
    for row in found["rows"].values():
        if "us" in row and "error" in row:
            row["tflops"] = round(flops(num_q, num_k, head_dim=dim) / row["us"] / 1e6, 1)
    return found


def triton_attention():
    from specedit_kernels.triton_kernels import mixed_res_attn_fp8

    return mixed_res_attn_fp8


def keep(rows, heads=24, dim=128, layers=20):
    """Keys and values as attention in e4m3 keeps them: the write of fresh rows, and a blend of two of 8704 rows.

    Rows go to 0, 1, 2, ... or, "of an edit", to those of a prompt and of a square in a picture. Writes go to the
    buffers of `layers` in turn, more than L2 holds: what a layer kept is not there at the next step.
    """
    from specedit_kernels.triton_kernels import qk_norm_rope_scatter

    whole = 8704
    qkv = normal(1, rows, 3 * heads, dim)
    q, k, v = qkv.chunk(3, dim=2)
    angle, weight = torch.rand(1, rows, dim // 2, device="cuda") * 6, torch.ones(dim, device="cuda").bfloat16()
    tables, options = (angle.cos(), angle.sin()), dict(q_weight=weight, k_weight=weight)
    in_order = torch.arange(rows, dtype=torch.int32, device="cuda")[None]
    text = PROMPT if rows > PROMPT else 0
    side = math.ceil((rows - text) ** 0.5)
    square = PROMPT + WIDTH * torch.arange(side)[:, None] + 5 + torch.arange(side)
    of_an_edit = torch.cat([torch.arange(text), square.flatten()[: rows - text]]).int().cuda()[None]
    kept = [torch.zeros(1, n, heads, dim, dtype=torch.bfloat16, device="cuda") for n in (rows, whole, whole)]
    plains = [[kept[0], *(x.clone() for x in kept[1:])] for _ in range(layers)]
    in_e4m3 = [[kept[0].to(E4M3), kept[1].to(E4M3), in_panels(kept[2].to(E4M3))] for _ in range(layers)]
    plain, outs = plains[0], in_e4m3[0]
    scales = [torch.full((1, 1, heads), 16 / 448, device="cuda") for _ in range(3)]
    exact = v.double()

    def check(_, index):
        found = of_panels(outs[2], whole)[:, index[0].long()]
        return {"error": error(found.double() * scales[2][..., None].double(), exact)}

    def write(outs, index, tokens):
        with mock.patch.object(qk_norm_rope_scatter, "_FP8_TOKENS", tokens):
            ops.qk_norm_rope_scatter_fp8_(*outs, q, k, v, *scales, *tables, kv_out_index=index, **options)

    def in_turn(function, sets):
        turn = itertools.cycle(sets)
        return lambda: function(next(turn))

    def write_bf16(outs, index):
        ops.qk_norm_rope_scatter_(*outs, q, k, v, *tables, kv_out_index=index, **options)

    fns, checks = {}, {}
    for name, index in (("", in_order), (", of an edit", of_an_edit)):
        if index is of_an_edit and rows == whole:
            continue
        fns["bf16" + name] = in_turn(partial(write_bf16, index=index), plains)
        for tokens in (32, 64):
            row = f"e4m3{name}, {tokens} tokens a program"
            fns[row] = in_turn(partial(write, index=index, tokens=tokens), in_e4m3)
            checks[row] = partial(check, index=index)
    if rows == whole:
        far, into, half = plain[1].clone(), plain[1].clone(), torch.tensor(0.5, device="cuda")
        fns["largest of v"] = lambda: torch.linalg.vector_norm(v, float("inf"), dim=(1, 3), dtype=torch.float32)
        fns["lerp of keys, bf16"] = lambda: torch.lerp(plain[1], far, half.bfloat16(), out=into)
        for name, x in (("keys", outs[1]), ("values", outs[2])):
            a, b = (x.view(torch.uint8).clone().view(E4M3) for _ in range(2))
            fns[f"lerp of {name}, e4m3"] = partial(
                ops.lerp_fp8_, a, scales[0].clone(), x, scales[1], b, scales[2], half
            )
    return timed(fns, checks)


def configs(num_q, num_k, dim):
    """Tile sizes of the fp8 attention in Triton, with bias and scales by row."""
    kernel = triton_attention()
    q, k, v, bias = inputs(num_q, num_k, head_dim=dim)
    (q8, qs), (k8, ks), (v8, vs) = (by_row(x) for x in (q, k, v))
    v8 = in_panels(v8)
    check = CheckFp8(q, k, v, bias, (q8, k8, v8, qs, ks, vs))
    fns = {}
    tiles = [(128, 128, 8, 2), (128, 128, 8, 3), (128, 128, 8, 4), (128, 64, 8, 3), (128, 64, 4, 3), (64, 128, 4, 3),
             (64, 64, 4, 4), (128, 256, 8, 2), (256, 64, 8, 3)]  # fmt: skip
    for m, n, warps, stages in tiles:
        for splits in (1, 2, 3) if num_q < 2000 else (1,):
            config = kernel.Config(m, n, warps, stages)
            fns[f"{m} x {n}, {warps} warps, {stages} stages, {splits} parts"] = partial(
                kernel.launch, q8, k8, v8, qs, ks, vs, bias, None, None, None, None, dim**-0.5, config, splits
            )
    return timed(fns, dict.fromkeys(fns, check))


def kept(dtype, outputs, inputs):
    """A weight kept in 8 bits, brought to bf16 for a product; "GB/s" of what is read and written."""
    x, scale = (normal(outputs, inputs) * 20).to(dtype), normal(outputs, 1).float().abs()
    fns = {
        "torch": lambda: x.to(torch.bfloat16),
        "op": lambda: ops.dequantize(x, torch.bfloat16),
        "op, a scale a row": lambda: ops.dequantize(x, torch.bfloat16, scale=scale),
        "torch, a scale a row": lambda: (x.float() * scale).to(torch.bfloat16),
    }
    exact, scaled = fns["torch"](), fns["torch, a scale a row"]()
    found = timed(fns, {"op": lambda y: {"equal": torch.equal(y, exact)},
                        "op, a scale a row": lambda y: {"equal": torch.equal(y, scaled)}})  # fmt: skip
    for row in found["rows"].values():
        if "us" in row:
            row["GB/s"] = round(3 * x.numel() / row["us"] / 1e3)
    return found


def in_blocks(kind, outputs, inputs):
    """The same of random blocks of GGUF, beside diffusers."""
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor

    values, size = BLOCKS[kind]
    x = torch.randint(0, 256, (outputs, inputs // values * size), dtype=torch.uint8, device="cuda")
    x &= 0xBF  # scales are finite
    weight = GGUFParameter(x, quant_type=gguf.GGMLQuantizationType[kind])

    def own():
        return dequantize_gguf_tensor(weight).to(torch.bfloat16)

    exact, fns = own(), {"op": lambda: ops.dequantize_gguf(x, kind, torch.bfloat16)}
    if kind == "Q8_0":  # of the others it waits for the host
        fns["diffusers"] = own
    found = timed(fns, {"op": lambda y: {"equal": torch.equal(y, exact)}})
    for row in found["rows"].values():
        if "us" in row:
            row["GB/s"] = round((x.numel() + 2 * exact.numel()) / row["us"] / 1e3)
    return found


def steps():
    """{case: callable} of an active step and a whole edit; one model for all."""
    import flux_kontext

    made, seen = [], {}

    def bench():
        if not made:
            names = ("out", "rows", "areas", "runners", "side", "text_length", "repeat", "patience", "tiny", "device",
                     "compiled")  # fmt: skip
            values = (None, ["*"], [0.1], ["graph"], 1024, 512, 5, 8.0, False, "cuda", False)
            made.append(flux_kontext.Bench(argparse.Namespace(**dict(zip(names, values)))))
        return made[0]

    def step(precision, attention):
        found = seen[precision, attention] = []
        step = bench().active_step("graph", precision=precision, attention=attention, seen=found)
        figures = bench().measure(step)
        if seen.get(("auto", "auto")):
            # float64 of 12 billion weights does not fit beside them
            figures["difference from bf16"] = error(found[0], seen["auto", "auto"][0].double())
        return figures

    def edit(name):
        return bench().measure(bench().rows()[name]())

    of_step = (("auto", "auto"), ("fp8", "auto"), ("fp8", "fp8"))
    cases = {f"active step, products {p}, attention {a}": partial(step, p, a) for p, a in of_step}
    locked = ("locked-cached", "locked-cached-fp8-products", "locked-cached-fp8-precision")
    kinds = [f"specedit-9-{kind}" for kind in locked]
    kinds += ["quality balanced", "quality balanced fp8-products", "quality balanced fp8"]
    for kind in kinds:
        cases[f"edit, {kind}"] = partial(edit, f"{kind} graph, 10%")
    return cases


def cases():
    """{part: {case: callable}}."""
    kinds = ("plain", "norm", "gelu", "gelu beside")
    return {
        "quantise": {f"{kind}, {rows}": partial(quantise, kind, rows) for kind in kinds for rows in ROWS},
        "linears": {f"{m} x {k} x {n}": partial(linear, m, k, n) for k, n in LAYERS for m in ROWS},
        "attention": {f"{q} x {k}, D {d}": partial(attention, q, k, d) for q, k, d in ATTENTION},
        "dequantise": {
            f"{n} x {k}, {d}": partial(kept, getattr(torch, d), n, k)
            for n, k, d in (
                (3072, 3072, "float8_e4m3fn"),
                (12288, 3072, "float8_e4m3fn"),
                (12288, 3072, "int8"),
                (3072, 15360, "int8"),
                (12288, 3072, "float8_e5m2"),
            )
        }
        | {f"12288 x 3072, {kind}": partial(in_blocks, kind, 12288, 3072) for kind in BLOCKS},
        "keep": {f"{rows} rows": partial(keep, rows) for rows in (410, 922, 3174, 8704)},
        "steps": steps(),
        "configs": {f"{q} x 8704, D 128": partial(configs, q, 8704, 128) for q in (8704, 922)},
    }


@torch.inference_mode()
def main(argv=None):
    every = cases()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/fp8"))
    parser.add_argument("--parts", nargs="+", choices=list(every), default=list(every))
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        raise SystemExit("a CUDA device of compute capability 8.9 or later is needed")
    args.out.mkdir(parents=True, exist_ok=True)
    found = environment() | {"parts": {}}
    for part in args.parts:
        found["parts"][part] = {}
        for case, run in every[part].items():
            try:
                figures = run()
            except Exception as problem:
                text = f"{type(problem).__name__}: {problem}"
                figures = {"failed": text[:500], "where": traceback.format_exc()[-1500:]}
            torch.cuda.empty_cache()
            found["parts"][part][case] = figures
            print(part, case, json.dumps(figures), flush=True)
            (args.out / "fp8.json").write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
