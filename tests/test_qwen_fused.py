# SPDX-License-Identifier: Apache-2.0
"""Qwen's steps of few launches against the forward of diffusers: whole, over kept keys, of two branches at once, and in
the pipeline."""

import copy
import functools

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageDecoder3d, QwenImageRMS_norm
from tiny_models import paper, qwen_text, tiny_image, tiny_qwen

from specedit_kernels import ops
from specedit_kernels.engine import registry
from specedit_kernels.engine.registry import codec_of
from specedit_kernels.models import qwen_image_edit as fused
from specedit_kernels.models.qwen_image_edit import FusedQwenModel, QwenText

needs_gpu = pytest.mark.gpu
pytestmark = pytest.mark.usefixtures("one_thread")
TEXT, TARGET, WIDTH = 5, (2, 4), 32


def tiny_transformer(zero_cond_t=False):
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6), zero_cond_t=zero_cond_t,
    )  # fmt: skip
    with torch.no_grad():
        # norms start with weights of one, and would hide which belongs to which
        for weight in transformer.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return transformer.eval()


def whole(transformer, batch, **more):
    """(the sequence of a target and a reference, diffusers' shapes of it)."""
    shapes = [(1, *TARGET), (1, 3, 2)]
    image, words = transformer.pos_embed([shapes], device=torch.device("cpu"), max_txt_seq_len=TEXT)
    turn = torch.cat([words, image])[None]
    if transformer.zero_cond_t:
        more["modulate"] = (torch.arange(14) >= 8).int().expand(batch, -1)
    return fused.MixedSequence(TEXT, turn.real, turn.imag, **more), [shapes] * batch


def inputs(batch):
    return torch.randn(batch, 14, 64), torch.randn(batch, TEXT, WIDTH)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded text"])
@pytest.mark.parametrize("zero", [False, True], ids=["", "zero_cond_t"])
def test_a_step_is_the_transformers_own(zero, padded):
    transformer, batch = tiny_transformer(zero), 2
    tokens, embeds = inputs(batch)
    mask = torch.ones(batch, TEXT, dtype=torch.bool)
    mask[1, 3:] = not padded
    bias = torch.zeros(batch, TEXT + 14).masked_fill_(~torch.cat([mask, mask.new_ones(batch, 14)], 1), float("-inf"))
    sequence, shapes = whole(transformer, batch, key_bias=bias if padded else None)
    timestep = torch.tensor([700.0, 300.0])
    expected = transformer(
        hidden_states=tokens, timestep=timestep / 1000, encoder_hidden_states=embeds,
        encoder_hidden_states_mask=mask if padded else None, img_shapes=shapes, return_dict=False,
    )[0]  # fmt: skip
    got = fused.fused_forward(transformer, tokens, embeds, fused.modulation(transformer, timestep, tokens), sequence)
    assert torch.allclose(got, expected, atol=3e-6) and expected.std() > 0.1


@torch.no_grad()
def test_half_precision_sums_end_at_the_ends_of_their_range():
    transformer = tiny_transformer().half()
    for layer in transformer.transformer_blocks:
        layer.img_mod[1].bias[-WIDTH:] = 2.0  # the gate
        layer.img_mlp.net[2].bias[0] = 6e4
    tokens, embeds = (x.half() for x in inputs(1))
    modulation = fused.modulation(transformer, torch.tensor([700.0]), tokens)
    got = fused.fused_forward(transformer, tokens, embeds, modulation, whole(transformer, 1)[0])
    assert got.dtype == torch.float16 and got.isfinite().all()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("zero", [False, True], ids=["", "zero_cond_t"])
def test_a_compiled_block_traces_whole_and_writes_to_kept_keys(zero):
    transformer, batch = tiny_transformer(zero), 1
    block = torch.compile(fused.double_block, fullgraph=True, backend="aot_eager")
    layer, (tokens, embeds) = transformer.transformer_blocks[0], inputs(batch)
    image_mod, text_mod = fused.modulation(transformer, torch.tensor([700.0]), tokens)
    plain, _ = whole(transformer, batch)
    rows = torch.arange(TEXT, TEXT + 14, dtype=torch.int32)[None]
    keys = torch.tensor([TEXT + 14], dtype=torch.int32)
    locked = fused.MixedSequence(
        0, plain.cos[:, TEXT:], plain.sin[:, TEXT:], torch.randn(1, 22), keys - TEXT, keys, rows,
        modulate=plain.modulate,
    )  # fmt: skip
    width = 6 * transformer.inner_dim
    for sequence in (plain, locked):
        start = [transformer.txt_in(embeds)[:, : sequence.text], transformer.img_in(tokens)]
        kept = None if sequence is plain else tuple(torch.randn(batch, 22, 2, 16) for _ in range(2))
        results = []
        for function in (fused.double_block, block):
            text, image = (x.clone() for x in start)
            own = kept and tuple(x.clone() for x in kept)
            function(layer, text, image, sequence, own, image_mod[..., :width], text_mod[:, :width], False)
            results.append((text, image, *(own or ())))
        assert all(torch.allclose(a, b, atol=2e-6) for a, b in zip(*results))
        assert not torch.allclose(results[0][1], start[1])
    torch._dynamo.reset()


def test_branches_are_joined_where_their_texts_are_nearly_of_one_length():
    model = FusedQwenModel.__new__(FusedQwenModel)
    text = lambda n, mask=None: QwenText(torch.randn(2, n, 4), mask)  # noqa: E731
    assert model.joined((text(5),)) is None and model.joined((text(5), text(5 + model.JOINED + 1))) is None
    same = model.joined((text(5), text(5)))
    assert same.mask is None and same.embeds.shape == (4, 5, 4)
    some = torch.tensor([[1, 1, 0], [1, 1, 1]])
    long, short = text(5), text(3, some)
    made = model.joined((long, short))
    assert made.mask.tolist() == [[1] * 5, [1] * 5, [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    assert torch.equal(made.embeds[:2], long.embeds) and torch.equal(made.embeds[2:, :3], short.embeds)


@torch.no_grad()
def test_lone_frames_are_the_models_own():
    vae = tiny_qwen().vae
    codec, x = codec_of(vae), torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = codec.encode(x)
    y = codec.decode(z)
    before, fused = list(vae.named_modules()), codec.fused()
    assert torch.allclose(fused.encode(x), z, atol=1e-5) and torch.allclose(fused.decode(z), y, atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(fused.features(z), codec.features(z)))
    assert list(vae.named_modules()) == before
    for call in (
        lambda: fused.vae.encode(torch.rand(1, 3, 5, 16, 16)),
        lambda: fused.vae.decode(torch.rand(1, 16, 2, 2, 2)),
    ):
        with pytest.raises(ValueError, match="frames: expected a single one"):
            call()


def varied(vae):
    """Norms start with weights of one and biases of convolutions near zero, and would hide which belongs to which."""
    with torch.no_grad():
        for name, x in vae.named_parameters():
            if name.endswith(("bias", "gamma")):
                x.add_(0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(len(name))).to(x))
    return vae


@torch.no_grad()
@pytest.mark.parametrize("served", ["reference", "triton"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_frames_of_varied_weights(monkeypatch, device, served, layout):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # or convolutions make more of a last bit
    codec = codec_of(varied(tiny_qwen().vae.to(device)))
    x = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)).to(device).contiguous(memory_format=layout)
    z = codec.encode(x)
    y = codec.decode(z)
    if served == "triton":
        pytest.importorskip("triton")
        monkeypatch.setenv("SPECEDIT_BACKEND", "triton")
    called, op = [], ops.channel_rms_norm
    monkeypatch.setattr(ops, "channel_rms_norm", lambda *args, **kwargs: called.append(1) or op(*args, **kwargs))
    fused = codec.fused()
    assert torch.allclose(fused.encode(x), z, atol=2e-5) and torch.allclose(fused.decode(z), y, atol=2e-5)
    assert len(called) == sum(isinstance(m, QwenImageRMS_norm) for m in codec.vae.modules())
    assert z.std() > 0.1 and y.std() > 0.05


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fewer_roundings_are_no_larger_errors(device, dtype):
    """In 16 bits, against float64."""
    vae = varied(tiny_qwen().vae.to(device, dtype))
    codec, exact = codec_of(vae), codec_of(copy.deepcopy(vae).double())
    fused = codec.fused()
    x = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)).to(device, dtype) * 2 - 1
    z = exact.encode(x.double())
    for run, given, expected in (
        (lambda codec, x: codec.encode(x), x, z), (lambda codec, z: codec.decode(z), z.to(dtype), None),
    ):  # fmt: skip
        expected = run(exact, given.double()) if expected is None else expected
        own, got = ((run(c, given).double() - expected).square().mean().sqrt() for c in (codec, fused))
        assert 0 < got <= 1.05 * own


def _watched_conv(vae):
    vae.decoder.up_blocks[0].resnets[0].conv1.register_forward_hook(lambda *args: None)


def _other_forward(vae):
    forward = vae.decoder.mid_block.forward
    vae.decoder.mid_block.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def _other_activation(vae):
    vae.decoder.up_blocks[0].resnets[0].nonlinearity = torch.nn.GELU()


@torch.no_grad()
@pytest.mark.parametrize("change", [_watched_conv, _other_forward, _other_activation])
def test_a_part_with_something_else_in_it_keeps_the_librarys_calls(change):
    vae = tiny_qwen().vae
    change(vae)
    codec, x = codec_of(vae), torch.rand(1, 3, 32, 48) * 2 - 1
    fused = codec.fused()
    assert type(fused.vae.decoder) is QwenImageDecoder3d and type(fused.vae.encoder) is not type(vae.encoder)
    assert sum("forward" in vars(m) for m in fused.vae.decoder.modules()) > 10
    z = codec.encode(x)
    assert torch.allclose(fused.encode(x), z, atol=1e-5)
    assert torch.allclose(fused.decode(z), codec.decode(z), atol=1e-5)


@torch.no_grad()
def test_tiles_and_slices_of_lone_frames():
    vae = tiny_qwen().vae
    vae.enable_slicing()
    vae.enable_tiling(32, 32, 24, 24)
    codec, x = codec_of(vae), torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = codec.encode(x)
    assert torch.allclose(codec.fused().encode(x), z, atol=1e-5)
    assert torch.allclose(codec.fused().decode(z), codec.decode(z), atol=1e-5)


def mask(columns):
    found = torch.zeros(128, 128)
    found[:, : 16 * columns] = 1
    return found


@functools.cache
def pipe_of(plus=False, zero=False, device="cpu"):
    plain = tiny_qwen(plus, zero)
    if device == "cuda":
        plain.to("cuda", torch.bfloat16)
    pipe = registry.pipelines()[type(plain)](**plain.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def edit(pipe, name, columns=2, seed=0, guided=True, padded=3, **options):
    config = paper(**{**dict(stages=(1, 4, 0), finish="locked", kv_refresh=4), **options}, runner=name)
    device, dtype = pipe.transformer.device, pipe.transformer.dtype
    text = qwen_text(padded=padded)
    if guided:
        text.update(qwen_text(7, negative=True, seed=4), true_cfg_scale=3.0)
    text = {k: v.to(device, dtype if v.is_floating_point() else v.dtype) if isinstance(v, torch.Tensor) else v
            for k, v in text.items()}  # fmt: skip
    pictures = [tiny_image(seed=seed)]
    if "Plus" in type(pipe).__name__:
        pictures.append(tiny_image(96, 160, seed=seed + 1))
    return pipe(image=pictures, mask_image=mask(columns), specedit=config, height=128, width=128, max_area=128 * 128,
                generator=torch.Generator().manual_seed(seed), output_type="pt", **text)  # fmt: skip


OPTIONS = {
    "full": dict(stages=(2, 2, 2), finish="full", kv_refresh=1), "cached": {}, "locked text": dict(lock_text=True),
    "whole steps, locked text": dict(kv_refresh=1, lock_text=True), "unguided draft": dict(draft_guidance=False),
    "dense": dict(stages=(0, 0, 2), finish="full", kv_refresh=1),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("plus", "zero"), [(False, False), (True, True)], ids=["edit", "plus zero_cond_t"])
def test_fused_edits_are_eager_ones(plus, zero, options, guided):
    pipe = pipe_of(plus, zero)
    expected, got = (edit(pipe, name, guided=guided, **options) for name in ("eager", "fused"))
    assert got.stats.runner == "fused" and expected.stats.runner == "eager"
    assert [s.flops for s in got.stats.steps] == [s.flops for s in expected.stats.steps]
    assert torch.allclose(got.images, expected.images, atol=1e-5) and expected.images.std() > 0.01
    kept = options.get("kv_refresh") != 1 or "lock_text" in options
    assert (got.stats.kv_cache_bytes > 0) == (expected.stats.kv_cache_bytes > 0) == kept


@pytest.mark.slow
@pytest.mark.parametrize("joined", [-1, 256])
def test_branches_one_by_one_and_at_once_are_the_same(monkeypatch, joined):
    monkeypatch.setattr(FusedQwenModel, "JOINED", joined)
    calls, forward = [], fused.fused_forward

    def counted(transformer, tokens, *rest):
        calls.append(tokens.shape[0])
        return forward(transformer, tokens, *rest)

    monkeypatch.setattr(fused, "fused_forward", counted)
    pipe = pipe_of(True, True)
    got = edit(pipe, "fused", lock_text=True, draft_guidance=False)
    assert torch.allclose(got.images, edit(pipe, "eager", lock_text=True, draft_guidance=False).images, atol=1e-5)
    assert calls == ([1] + [1] * 8 if joined < 0 else [1] + [2] * 4)


@pytest.mark.slow
def test_the_timestep_hook_of_our_own_is_no_reason_to_stay_eager():
    pipe = pipe_of(True, True)
    for _ in range(2):  # the first call puts it on
        assert edit(pipe, "fused").stats.runner == "fused"
    blocks = pipe.transformer.transformer_blocks
    assert blocks[0]._forward_pre_hooks
    handle = blocks[0].register_forward_pre_hook(lambda *arguments: None)
    assert edit(pipe, "fused").stats.runner == "eager"
    handle.remove()


# on a GPU


@needs_gpu
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("plus", "zero"), [(False, False), (True, True)], ids=["edit", "plus zero_cond_t"])
def test_replayed_steps_are_the_steps_to_the_last_bit(plus, zero, options):
    pipe = pipe_of(plus, zero, "cuda")
    expected = {columns: edit(pipe, "fused", columns, columns, **options) for columns in (2, 6)}
    for columns in (2, 6, 2):
        out = edit(pipe, "graph", columns, columns, **options)
        assert out.stats.runner == "graph" and torch.equal(out.images, expected[columns].images)
    assert out.stats.captures == 0 and out.stats.graph_bytes > 0
    eager = edit(pipe, "eager", 2, 2, **options).images
    assert (expected[2].images - eager).norm() < 0.02 * eager.norm()


@needs_gpu
@pytest.mark.parametrize("options", [dict(lock_text=True), dict(draft_guidance=False), OPTIONS["full"]], ids=str)
def test_heads_of_the_published_size(options):
    """128 channels a head, texts of two lengths, kept keys of two branches in one buffer."""
    plain = tiny_qwen(True, True)
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        num_layers=2, attention_head_dim=128, num_attention_heads=2, joint_attention_dim=32, zero_cond_t=True
    )  # fmt: skip
    plain.register_modules(transformer=transformer)
    plain.to("cuda", torch.bfloat16)
    pipe = registry.pipelines()[type(plain)](**plain.components)
    pipe.set_progress_bar_config(disable=True)
    for columns in (2, 6):
        eager, *others = (edit(pipe, name, columns, **options).images for name in ("eager", "fused", "graph", "graph"))
        assert torch.equal(others[0], others[1]) and torch.equal(others[0], others[2])
        assert (others[0] - eager).norm() < 0.02 * eager.norm()


@pytest.mark.slow
@needs_gpu
def test_compiled_steps_are_near_the_eager_ones():
    pipe = pipe_of(True, True, "cuda")
    out, eager = (edit(pipe, name, lock_text=True) for name in ("compile", "eager"))
    assert out.stats.runner == "compile" and out.stats.captures
    assert (out.images - eager.images).norm() < 0.02 * eager.images.norm()
