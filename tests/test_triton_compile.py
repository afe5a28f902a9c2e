# SPDX-License-Identifier: Apache-2.0
"""The kernels compile to machine code that fits their GPU. No GPU is needed: Triton brings its assembler.

Compiled in a process of its own, because kernels that were imported under TRITON_INTERPRET=1 cannot be compiled.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
import torch

# Bytes of shared memory that one block may take.
SHARED = {90: 232448, 89: 101376, 80: 166912}
CAPABILITY = {"large": 90, "medium": 80}
POINTERS = {
    "bias_ptr": "*fp32", "q_index_ptr": "*i32", "kv_index_ptr": "*i32", "out_index_ptr": "*i32", "q_lens_ptr": "*i32",
    "kv_lens_ptr": "*i32", "cu_q_ptr": "*i32", "cu_k_ptr": "*i32", "lse_ptr": "*fp32", "part_ptr": "*fp32",
    "part_total_ptr": "*fp32", "part_top_ptr": "*fp32", "a_lse_ptr": "*fp32", "b_lse_ptr": "*fp32", "index_ptr": "*i32",
    "modulation_ptr": "*i32", "cos_ptr": "*fp32", "sin_ptr": "*fp32", "eps": "fp32",
}  # fmt: skip
PLAIN = ("q_index_ptr", "kv_index_ptr", "out_index_ptr", "q_lens_ptr", "kv_lens_ptr", "cu_q_ptr", "cu_k_ptr")
FEATURES = {
    "no bias": (*PLAIN, "bias_ptr"),
    "lens and indices": ("kv_index_ptr", "cu_q_ptr", "cu_k_ptr"),
    "packed": ("q_index_ptr", "kv_index_ptr", "out_index_ptr"),
    "split": PLAIN,
}


def _exponents(ptx):
    """How the arguments of the exponentials come about: {"mul of sub", ...}."""
    made = {name: (op.split(".")[0], args) for op, name, args in re.findall(r"^\s*(\S+)\s+(%\w+), (.*);", ptx, re.M)}
    found = set()
    for name in re.findall(r"ex2\.\S+\s+%\w+, (%\w+);", ptx):
        op, args = made.get(name, ("?", ""))
        inner = {made.get(arg.strip(), ("?", ""))[0] for arg in args.split(",")}
        found.add(f"{op} of sub" if "sub" in inner else op)
    return sorted(found)


def _byte_stores(ttgir):
    """(threads of a warp, over which dimension first) of each store of bytes that no vector holds."""
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<(.*)>", ttgir, re.M))
    found = []
    for shape, name in re.findall(r"tt\.store .* : tensor<([\dx]+)x!tt\.ptr<i8>, (#\w+)>", ttgir):
        per_thread = re.search(r"sizePerThread = \[([\d, ]+)\]", layouts[name]).group(1)
        if set(per_thread.split(", ")) == {"1"}:
            threads = re.search(r"threadsPerWarp = \[([\d, ]+)\]", layouts[name]).group(1)
            found.append([shape, threads])
    return found


def _compile(fn, capability, types, constants, options, source):
    """Compile `fn` with all arguments int32 but for `types` and `constants` (None: an argument left out)."""
    import triton
    from triton.backends.compiler import GPUTarget

    names = fn.arg_names
    signature = {
        name: "constexpr" if name in constants else types.get(name, POINTERS.get(name, "i32")) for name in names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or (name.startswith(("stride", "size")) and signature[name] == "i32")
    }
    constants = {(names.index(name),): value for name, value in constants.items() if name in names}
    options = {"enable_fp_fusion": True, **options}
    compiled = triton.compile(
        source(fn, signature, constants, aligned), target=GPUTarget("cuda", capability, 32), options=options
    )
    loads, stores = (len(re.findall(rf"{kind}\.global[\w.:]*\.v4\.b32", compiled.asm["ptx"])) for kind in ("ld", "st"))
    fp8_products = len(re.findall(r"mma[\w.]*e4m3\.e4m3", compiled.asm["ptx"]))
    return {
        "capability": capability, "shared": compiled.metadata.shared, "code": len(compiled.asm["cubin"]),
        "vectors": (loads, stores), "exponents": _exponents(compiled.asm["ptx"]), "fp8_products": fp8_products,
        "bytes": _byte_stores(compiled.asm["ttgir"]),
        "multiply_adds": len(re.findall(r"\bfma\.", compiled.asm["ptx"])),
    }  # fmt: skip


def _attention(name, config, head_dim, dtype="bf16", left_out=(), splits=1):
    import triton
    from triton.compiler import ASTSource

    from specedit_kernels.triton_kernels import mixed_res_attn

    block_d = max(16, triton.next_power_of_2(head_dim))
    types = {"q_ptr": f"*{dtype}", "k_ptr": f"*{dtype}", "v_ptr": f"*{dtype}", "scale": "fp32"}
    types["out_ptr"] = "*fp32" if splits > 1 else f"*{dtype}"
    constants = dict.fromkeys(left_out)
    if splits == 1:
        constants["part_top_ptr"] = None
    constants.update(
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=config.block_m, BLOCK_N=config.block_n, SPLITS=splits,
        NEGATE=False,
    )  # fmt: skip
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    block = f"{dtype}[1,1,{config.block_n},{block_d}]"
    descriptors = config.tma and "kv_index_ptr" in left_out
    if descriptors:
        types.update(dict.fromkeys(("k_desc", "v_desc"), f"tensordesc<{block}>"))
    else:
        constants.update(k_desc=None, v_desc=None)
    if descriptors and "bias_ptr" not in left_out and "cu_k_ptr" in left_out:
        types["bias_desc"] = f"tensordesc<fp32[1,{config.block_n}]>"
    else:
        constants["bias_desc"] = None
    return _compile(mixed_res_attn._attn_kernel, CAPABILITY[name], types, constants, options, ASTSource)


def _beside_attention(capability):
    """{kernel: job} of the ops beside attention at the two models' size: 24 heads of 128, 3072 channels, bf16."""
    from triton.compiler import ASTSource

    from specedit_kernels.triton_kernels import _modulation, adaln_modulate, gated_residual_add, qk_norm_rope_scatter

    scales = ("q_scale_ptr", "k_scale_ptr", "v_scale_ptr")
    block_d, tokens, heads, kv_heads, slices, _ = qk_norm_rope_scatter.tile(8704, 24, 24, 128)
    slots, block, chunks, _ = _modulation.tile(8704, 3072, 2)
    by_head = dict(HEAD_DIM=128, BLOCK_D=block_d, TOKENS=tokens, HEADS=heads, KV_HEADS=kv_heads, SLICES=slices,
                   stride_cd=1, stride_sd=1, FP8=False, PANEL=0, HARDWARE=False, V_TOKENS=0, v_words_ptr=None,
                   **dict.fromkeys(scales))  # fmt: skip
    by_token = dict(CHANNELS=3072, BLOCK=block, CHUNKS=chunks, SLOTS=slots)
    jobs = {}
    for fn, constants in (
        (qk_norm_rope_scatter._qk_norm_rope_scatter_kernel, by_head),
        (adaln_modulate._adaln_modulate_kernel, by_token),
        (gated_residual_add._gated_residual_add_kernel, by_token),
    ):
        types = {name: "*bf16" for name in fn.arg_names if name.endswith("_ptr") and name not in POINTERS}
        jobs[f"{fn.__name__} {capability}"] = lambda f=fn, t=types, c=constants: _compile(
            f, capability, t, c, {"num_warps": 4}, ASTSource
        )
    fn = qk_norm_rope_scatter._qk_norm_rope_scatter_kernel
    block_d, tokens, heads, kv_heads, slices, num_warps = qk_norm_rope_scatter.tile(8704, 24, 24, 128, fp8=True)
    types = {name: "*bf16" for name in fn.arg_names if name.endswith("_ptr") and name not in POINTERS}
    types |= dict.fromkeys(scales, "*fp32") | dict.fromkeys(("q_out_ptr", "k_out_ptr", "v_out_ptr"), "*u8")
    types["v_words_ptr"] = "*i32"
    in_fp8 = dict(HEAD_DIM=128, BLOCK_D=block_d, TOKENS=tokens, HEADS=heads, KV_HEADS=kv_heads, SLICES=slices,
                  stride_cd=1, stride_sd=1, FP8=True, PANEL=64, HARDWARE=capability >= 89,
                  V_TOKENS=qk_norm_rope_scatter.panel_tokens(8704))  # fmt: skip
    for name, constants in (("fp8", in_fp8), ("fp8, v not aligned", in_fp8 | {"v_words_ptr": None})):
        jobs[f"{fn.__name__} {name} {capability}"] = lambda c=constants: _compile(
            fn, capability, types, c, {"num_warps": num_warps}, ASTSource
        )
    return jobs


def _quantize_fp8(capability):
    """{kernel: job} at FLUX's size in bf16: the norm of 3072 channels, and GELU of 12288 beside 3072."""
    from triton.compiler import ASTSource

    from specedit_kernels.triton_kernels import _modulation, quantize_fp8

    types = dict.fromkeys(("x_ptr", "before_ptr", "scale_ptr", "shift_ptr"), "*bf16")
    types |= {"y_ptr": "*u8", "row_scale_ptr": "*fp32"}
    unused = dict.fromkeys(("before_ptr", "scale_ptr", "shift_ptr", "modulation_ptr"))
    jobs = {}
    for name, channels, constants in (
        ("norm", 3072, dict(before_ptr=None, BEFORE=0, BEFORE_BLOCK=1, BEFORE_CHUNKS=0, GELU=False)),
        ("gelu", 12288, unused | dict(BEFORE=0, BEFORE_BLOCK=1, BEFORE_CHUNKS=0, GELU=True)),
        ("both", 12288, {k: None for k in unused if k != "before_ptr"}
         | dict(BEFORE=3072, BEFORE_BLOCK=4096, BEFORE_CHUNKS=1, GELU=True)),
    ):  # fmt: skip
        slots, block, chunks, num_warps = _modulation.tile(8704, channels, 2)
        constants |= dict(CHANNELS=channels, BLOCK=block, CHUNKS=chunks, SLOTS=slots, HARDWARE=capability >= 89)
        jobs[f"quantize_fp8 {name} {capability}"] = lambda c=constants, w=num_warps: _compile(
            quantize_fp8._quantize_fp8_kernel, capability, types, c, {"num_warps": w}, ASTSource
        )
    return jobs


def _lerp_fp8(capability):
    """{kernel: job} of 8704 keys of 24 heads."""
    from triton.compiler import ASTSource

    from specedit_kernels.triton_kernels import lerp_fp8

    fn, (block_m, block_n) = lerp_fp8._lerp_fp8_kernel, lerp_fp8.tile(8704, 128)
    types = {"out_ptr": "*u8", "a_ptr": "*fp8e4nv", "b_ptr": "*fp8e4nv", "weight_ptr": "*fp32"}
    types |= dict.fromkeys(("out_scale_ptr", "a_scale_ptr", "b_scale_ptr"), "*fp32")
    constants = dict(BLOCK_M=block_m, BLOCK_N=block_n, HARDWARE=True)
    return {f"lerp_fp8 {capability}": lambda: _compile(fn, capability, types, constants, {"num_warps": 4}, ASTSource)}


def _lerp(capability):
    """{kernel: job} of 8704 keys of 24 heads in bf16."""
    from triton.compiler import ASTSource

    from specedit_kernels.triton_kernels import lerp

    block_m, block_n = lerp.tile(8704, 24 * 128, 2)
    types = dict.fromkeys(("out_ptr", "a_ptr", "b_ptr"), "*bf16") | {"weight_ptr": "*fp32"}
    constants = dict(BLOCK_M=block_m, BLOCK_N=block_n)
    return {
        f"lerp {capability}": lambda: _compile(
            lerp._lerp_kernel, capability, types, constants, {"num_warps": 4}, ASTSource
        )
    }


def _dequantize(capability):
    """{kernel: job} of one architecture: rows of 12288 numbers."""
    from triton.compiler import ASTSource

    from specedit_kernels.triton_kernels import dequantize

    jobs, sizes = {}, dict(TILE=dequantize.TILE, CHUNKS=dequantize.tile(12288)[1])
    for name, kind, to, scaled in (("e4m3", "e4m3", "*bf16", True), ("e4m3 alone", "e4m3", "*bf16", False),
                                   ("int8", "int8", "*bf16", True), ("e5m2", "e5m2", "*fp16", False)):  # fmt: skip
        types = {"x_ptr": "*u8", "y_ptr": to, "scale_ptr": "*fp32"}
        constants = sizes | dict(KIND=kind) | ({} if scaled else {"scale_ptr": None})
        jobs[f"dequantize {name} {capability}"] = lambda t=types, c=constants: _compile(
            dequantize._dequantize_kernel, capability, t, c, {"num_warps": dequantize.WARPS}, ASTSource
        )
    return jobs


GGUF = ("Q5_1", "Q8_0", "Q3_K", "Q4_K", "Q6_K")


def _dequantize_gguf(capability, kinds):
    """{kernel: job} of one architecture."""
    from triton.compiler import ASTSource

    from specedit_kernels.triton_kernels import dequantize_gguf

    fn, types = dequantize_gguf._dequantize_gguf_kernel, {"x_ptr": "*u8", "half_ptr": "*fp16", "y_ptr": "*bf16"}
    return {f"dequantize {kind} {capability}": lambda k=kind: _compile(
        fn, capability, types, dequantize_gguf.tile(k), dequantize_gguf.OPTIONS, ASTSource
    ) for kind in kinds}  # fmt: skip


def _attention_fp8(name, dim, panel, left_out, by_row):
    """panel: keys of a panel of v, 0 where it is as k."""
    import triton
    from triton.compiler import ASTSource

    from specedit_kernels.triton_kernels import mixed_res_attn_fp8

    config, capability = mixed_res_attn_fp8.CONFIGS[name, dim], {"large": 90, "small": 89}[name]
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), "*fp8e4nv") | {"out_ptr": "*bf16", "scale": "fp32"}
    types |= dict.fromkeys(("q_scale_ptr", "k_scale_ptr", "v_scale_ptr"), "*fp32")
    constants = dict.fromkeys(left_out) | {"stride_vd": panel or 1, "PANEL": panel}
    constants |= dict(HEAD_DIM=dim, BLOCK_D=triton.next_power_of_2(dim), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
                      SPLITS=1, NEGATE=False, K_ROWS=by_row, V_ROWS=by_row, HARDWARE=True)  # fmt: skip
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return _compile(mixed_res_attn_fp8._attn_fp8_kernel, capability, types, constants, options, ASTSource)


def _group_norm(capability):
    """{kernel: job} at the size of FLUX's decoder, 32 groups of bf16 1024 x 1024, in both layouts."""
    from triton.compiler import ASTSource

    from specedit_kernels.triton_kernels import group_norm

    types = dict.fromkeys(("mean_ptr", "squares_ptr", "group_mean_ptr", "group_variance_ptr"), "*fp32")
    types |= dict.fromkeys(("x_ptr", "y_ptr", "weight_ptr", "bias_ptr"), "*bf16")
    jobs = {}
    for fn in (group_norm._statistics_kernel, group_norm._combine_kernel, group_norm._normalise_kernel):
        for layout, stride in (("channels first", "stride_s"), ("channels last", "stride_c")):
            rows, block = group_norm.tile(128, 1024 * 1024, layout == "channels last", 2)
            block = 4096 if fn is group_norm._combine_kernel else block
            constants = {"CHANNELS": 128, "GROUP_CHANNELS": 4, "SILU": True, "ROWS": rows, "BLOCK": block, stride: 1}
            constants["x_bias_ptr"] = None
            jobs[f"{fn.__name__} {layout} {capability}"] = lambda f=fn, c=constants: _compile(
                f, capability, types, c, {"num_warps": 4}, ASTSource
            )
    return jobs


def _beside_convolutions(capability):
    """{kernel: job} of autoencoders beside their convolutions and group norms, at 1024 x 1024: FLUX's, and Qwen's norm
    of 96 channels."""
    from triton.compiler import ASTSource

    from specedit_kernels.triton_kernels import add_bias, channel_rms_norm, scaled_softmax

    types = dict.fromkeys(("x_ptr", "bias_ptr", "residual_ptr"), "*bf16")
    constants = {"CHANNELS": 128, "BLOCK": 4096, "pixels": 1, "residual_bias_ptr": None}
    rows, block, num_warps = channel_rms_norm.tile(96, 2)
    of_rms = dict.fromkeys(("x_ptr", "y_ptr", "weight_ptr", "x_bias_ptr"), "*bf16") | {"root": "fp32"}
    norm = dict(CHANNELS=96, SILU=True, ROWS=rows, BLOCK=block, stride_c=1, bias_ptr=None)
    return {
        f"{fn.__name__} {capability}": lambda f=fn, t=types, c=constants, w=warps: _compile(
            f, capability, t, c, {"num_warps": w}, ASTSource
        )
        for fn, types, constants, warps in (
            (add_bias._add_bias_kernel, types, constants, 4),
            (scaled_softmax._scaled_softmax_kernel, {"x_ptr": "*fp32", "y_ptr": "*bf16", "scale": "fp32"},
             {"BLOCK": 16384, "WHOLE": True}, 16),
            (channel_rms_norm._channel_rms_norm_kernel, of_rms, norm, num_warps),
        )
    }  # fmt: skip


def compile_all():
    """{kernel: shared memory and size of the machine code, or the error}."""
    from triton.compiler import ASTSource

    from specedit_kernels.triton_kernels import merge_attn, mixed_res_attn, sparse_cross_attn

    dense, gather, fp32 = mixed_res_attn.DENSE_CONFIGS, mixed_res_attn.GATHER_CONFIGS, mixed_res_attn.FP32_CONFIGS
    jobs = {}
    for (name, dim), config in dense.items():
        if name in CAPABILITY:
            jobs[f"dense {name} D{dim}"] = lambda n=name, c=config, d=dim: _attention(n, c, d, left_out=PLAIN)
    for (name, dim), config in gather.items():
        jobs[f"gather {name} D{dim}"] = lambda n=name, c=config, d=dim: _attention(
            n, c, d, "fp16", left_out=("cu_q_ptr", "cu_k_ptr")
        )
    for dim, config in fp32.items():
        jobs[f"fp32 D{dim}"] = lambda c=config, d=dim: _attention("medium", c, d, "fp32", left_out=PLAIN)
    for feature, left_out in FEATURES.items():
        jobs[f"{feature} large D96"] = lambda f=feature, out=left_out: _attention(
            "large", dense["large", 128], 96, left_out=out, splits=2 if f == "split" else 1
        )
    small = {"HEAD_DIM": 96, "BLOCK_D": 128, "BLOCK_R": 16, "SPLITS": 3, "out_index_ptr": None}
    outputs = dict.fromkeys(("out_ptr", "a_ptr", "b_ptr"), "*bf16")
    for fn in (mixed_res_attn._combine_kernel, merge_attn._merge_kernel):
        used = {name: value for name, value in small.items() if name in fn.arg_names}
        jobs[fn.__name__] = lambda f=fn, u=used: _compile(f, 90, outputs, u, {"num_warps": 4}, ASTSource)
    jobs.update(_beside_attention(80) | _beside_attention(90) | _group_norm(80) | _group_norm(90))
    jobs.update(_beside_convolutions(80) | _beside_convolutions(90))
    plain = ("q_index_ptr", "kv_index_ptr", "q_lens_ptr", "kv_lens_ptr")
    for name in ("large", "small"):
        for dim in (64, 128, 256):
            jobs[f"fp8 {name} D{dim}"] = lambda n=name, d=dim: _attention_fp8(n, d, 64, plain, True)
        jobs[f"fp8 {name} by head, no bias"] = lambda n=name: _attention_fp8(n, 128, 0, (*plain, "bias_ptr"), False)
        jobs[f"fp8 {name} by index"] = lambda n=name: _attention_fp8(n, 128, 64, (), True)
    jobs.update(_quantize_fp8(80) | _quantize_fp8(89) | _quantize_fp8(90) | _lerp_fp8(89) | _lerp_fp8(90))
    jobs.update(_lerp(80) | _lerp(90))
    jobs.update(_dequantize(80) | _dequantize(90) | _dequantize_gguf(80, ["Q8_0"]) | _dequantize_gguf(90, GGUF))
    listing = {"mask_ptr": "*u8"} | dict.fromkeys(("region_ptr", "query_ptr", "token_ptr", "count_ptr"), "*i32")
    for capability in (80, 90):
        early = capability == 90
        jobs[f"sparse list {capability}"] = lambda c=capability, e=early: _compile(
            sparse_cross_attn._list_kernel, c, listing, {"BLOCK_L": sparse_cross_attn.BLOCK_L, "EARLY": e},
            {"num_warps": 8}, ASTSource,
        )  # fmt: skip
        configs = sparse_cross_attn.CONFIGS["small"] | (sparse_cross_attn.CONFIGS["large"] if early else {})
        for (dim, half), (block_m, block_n, few, num_warps, num_stages) in configs.items():
            types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16" if half else "*fp32")
            types |= listing | {"scale": "fp32"}
            blocks = dict(HEAD_DIM=dim, BLOCK_D=dim, BLOCK_M=block_m, BLOCK_N=block_n, FEW=few,
                          ROWS=sparse_cross_attn.ROWS, EARLY=early, NEGATE=False)  # fmt: skip
            launch = {"num_warps": num_warps, "num_stages": num_stages, "launch_pdl": early}
            jobs[f"sparse {capability} D{dim} {types['q_ptr']}"] = lambda c=capability, t=types, b=blocks, w=launch: (
                _compile(sparse_cross_attn._sparse_cross_attn_kernel, c, t, b, w, ASTSource)
            )
    results = {}
    for name, job in jobs.items():
        try:
            results[name] = job()
        except Exception as error:  # reported by the test
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    return results


@pytest.mark.slow
def test_every_config_compiles_and_fits(tmp_path):
    pytest.importorskip("triton")
    report = tmp_path / "report.json"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, __file__, str(report)], env=environment, check=True, timeout=600)
    results = json.loads(report.read_text())
    assert len(results) > 15
    wrong = {
        name: result
        for name, result in results.items()
        if "error" in result or result["shared"] > SHARED[result["capability"]] or not result["code"]
    }
    assert not wrong
    # The largest score is subtracted before the product with the unit: fused into one multiply-add, it would leave what
    # rounding took off it, which a power of two makes infinite in fp16.
    softmaxes = {
        name: result["exponents"]
        for name, result in results.items()
        if result["exponents"] and not name.startswith("fp8 ") and not name.startswith("quantize")
    }
    attention = {name: found for name, found in softmaxes.items() if "sparse" in name or "D" in name.split()[-1]}
    assert len(attention) > 15 and not {name: x for name, x in attention.items() if x != ["mul of sub"]}
    for name, result in results.items():
        if name.startswith("fp8 "):
            # the same, and the power of two that e4m3 weights are multiplied with
            assert result["fp8_products"] and {"fma of sub", "add of sub"} & set(result["exponents"]), (name, result)
            assert not {"fma", "mul", "add"} & set(result["exponents"]), (name, result)
    # (loads, stores) of 16 bytes: q, k, v, two tables and two weights; three chunks of a token, scale and shift, or of
    # two tokens and a gate; a tile of a picture, with channels last its weight and bias too.
    expected = {"_qk_norm_rope_scatter_kernel": [7, 3], "_adaln_modulate_kernel": [9, 3],
                # e4m3: of v four tokens, twice 8 channels, and two stores; of q, k, tables and weights twice as much
                "_qk_norm_rope_scatter_kernel fp8": [16, 4],
                "_gated_residual_add_kernel": [9, 3], "_statistics_kernel channels first": [4, 0],
                "_statistics_kernel channels last": [4, 0], "_normalise_kernel channels first": [4, 4],
                "_normalise_kernel channels last": [6, 4],
                # of a map, its residual and the bias; of half a row's fp32 of 512 threads
                "_add_bias_kernel": [12, 4], "_scaled_softmax_kernel": [8, 4],
                "_channel_rms_norm_kernel": [4, 4]}  # fmt: skip
    for capability in (80, 90):
        # of v to any rows: threads of a warp in the order of what is written, keys of a channel and then the next one's
        for name in ("fp8", "fp8, v not aligned"):
            assert results[f"_qk_norm_rope_scatter_kernel {name} {capability}"]["bytes"] == [["1024", "32"]] * 4
    # bytes: of all three, 16 at once
    assert results["lerp_fp8 90"]["vectors"] == [4, 2]
    assert results["lerp 90"]["vectors"] == results["lerp 80"]["vectors"] == [8, 4]
    # each read 8 bytes of a thread, each write 16, and nothing goes from one to another
    for name in ("e4m3", "e4m3 alone", "int8", "e5m2"):
        for found in (results[f"dequantize {name} {capability}"] for capability in (80, 90)):
            assert found["vectors"] == [0, 6] and found["shared"] == 0, (name, found)
    # two rounded sums would be another one as a multiply-add
    assert not any(results[f"dequantize {kind} 90"]["multiply_adds"] for kind in GGUF)
    for capability in (80, 90):
        found = results[f"dequantize Q8_0 {capability}"]
        assert found["vectors"] == [0, 2] and found["shared"] == 0
    for name, vectors in expected.items():
        for capability in (80, 90):
            assert results[f"{name} {capability}"]["vectors"] == vectors


def test_splits_of_the_keys():
    """24 heads on 132 multiprocessors (H100): 3 and 2 parts were the fastest; full waves and few keys stay whole."""
    kernel = pytest.importorskip("specedit_kernels.triton_kernels.mixed_res_attn")
    picked = {
        (num_q, num_k): kernel._select_splits(-(-num_q // 128) * 24, -(-num_k // 128), 132)
        for num_q, num_k in ((8704, 8704), (4608, 4608), (1536, 8704), (922, 8704), (1536, 1536), (1, 128))
    }
    expected = {(8704, 8704): 1, (4608, 4608): 1, (1536, 8704): 3, (922, 8704): 2, (1536, 1536): 1, (1, 128): 1}
    assert picked == expected


def test_descriptors_hold_what_their_constructor_would():
    kernel = pytest.importorskip("specedit_kernels.triton_kernels.mixed_res_attn")
    x = torch.zeros(1, 40, 3, 64, dtype=torch.bfloat16)
    shape, block = [1, 3, 40, 64], [1, 1, 32, 64]
    made = kernel._descriptor(x, shape, [7680, 64, 192, 1], block)
    expected = kernel.TensorDescriptor(x, shape, [8, 64, 192, 1], block)
    for field in dataclasses.fields(expected):
        assert field.name == "base" or getattr(made, field.name) == getattr(expected, field.name)
    assert made.base is x
    # Off the 16 B grid, by address or by stride; no rows.
    assert kernel._descriptor(x[..., 1:], shape, [7680, 64, 192, 1], block) is None
    assert kernel._descriptor(x, shape, [7680, 63, 192, 1], block) is None
    assert kernel._descriptor(x[:, :0], [1, 3, 0, 64], [7680, 64, 192, 1], block) is None


if __name__ == "__main__":
    with open(sys.argv[1], "w") as file:
        json.dump(compile_all(), file)
