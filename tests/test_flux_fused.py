# SPDX-License-Identifier: Apache-2.0
"""Steps of few launches against the forward of diffusers: block by block, whole, and in the pipeline."""

import copy

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.models.resnet import ResnetBlock2D
from tiny_models import call_options, paper, tiny_image, tiny_pipeline

from specedit_kernels import SpecEditFluxKontextPipeline, ops
from specedit_kernels.engine.attention import with_layout, wrap_processors
from specedit_kernels.engine.autoencoder import with_fused_norms
from specedit_kernels.engine.fused import _as_one, gelu, of_both
from specedit_kernels.engine.kv_cache import KVCache
from specedit_kernels.engine.runner import StepRunner
from specedit_kernels.engine.sequence import StepLayout
from specedit_kernels.models import flux_kontext as fused

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT, IMAGE, WIDTH, HEADS, DIM = 5, 12, 32, 2, 16


def tiny_transformer(guidance=True):
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=DIM, num_attention_heads=HEADS,
        joint_attention_dim=WIDTH, pooled_projection_dim=16, guidance_embeds=guidance, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    with torch.no_grad():
        # norms start with weights of one, and would hide which belongs to which
        for weight in transformer.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return transformer.eval()


def tables(batch, tokens):
    angle = torch.randn(batch, tokens, DIM // 2)
    return angle.cos(), angle.sin()


@torch.no_grad()
@pytest.mark.parametrize("joined", [False, True], ids=["", "fused q k v"])
@pytest.mark.parametrize("guidance", [False, True])
def test_a_step_is_the_transformers_own(guidance, joined):
    transformer, batch = tiny_transformer(guidance), 2
    tokens, embeds = torch.randn(batch, IMAGE, 64), torch.randn(batch, TEXT, WIDTH)
    pooled, timestep = torch.randn(batch, 16), torch.tensor([700.0, 300.0])
    scale = torch.full([batch], 2.5) if guidance else None
    text_ids, ids = torch.zeros(TEXT, 3), torch.randint(0, 8, (IMAGE, 3)).float()
    expected = transformer(
        hidden_states=tokens, timestep=timestep / 1000, guidance=scale, pooled_projections=pooled,
        encoder_hidden_states=embeds, txt_ids=text_ids, img_ids=ids, return_dict=False,
    )[0]  # fmt: skip
    if joined:
        transformer.fuse_qkv_projections()
    cos, sin = (x[None, :, ::2] for x in transformer.pos_embed(torch.cat([text_ids, ids])))
    modulation = fused.modulation(transformer, timestep, scale, pooled)
    got = fused.fused_forward(transformer, tokens, embeds, modulation, fused.MixedSequence(TEXT, cos, sin))
    assert torch.allclose(got, expected, atol=3e-6) and expected.std() > 0.1


def run_block(kind, block, x, sequence, kept, temb, blocks=fused.BLOCKS):
    """The fused block on a copy of x."""
    x, emb = x.clone(), torch.nn.functional.silu(temb)
    if kind == "double":
        blocks[0](block, x, sequence, kept, block.norm1.linear(emb), block.norm1_context.linear(emb))
    else:
        blocks[1](block, x, sequence, kept, block.norm.linear(emb))
    return x


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("kind", ["double", "single"])
def test_a_block_over_kept_keys_is_that_of_diffusers(kind, padded):
    """Over all tokens first, which leaves keys and values behind; then over the first ones of each sample anew."""
    transformer, batch, tokens = tiny_transformer(), 2, TEXT + IMAGE
    wrap_processors(transformer)
    block = (transformer.transformer_blocks if kind == "double" else transformer.single_transformer_blocks)[1]
    lengths = torch.tensor([tokens, tokens - 3] if padded else [tokens, tokens], dtype=torch.int32)
    fresh = torch.tensor([TEXT + 6, TEXT + 4], dtype=torch.int32)
    cos, sin = tables(batch, tokens)
    bias, temb = torch.randn(batch, tokens), torch.randn(batch, WIDTH)
    # more rows than there are tokens, and what was never written is no number
    kept = tuple(torch.full((batch, tokens + 4, HEADS, DIM), float("nan")) for _ in range(2))
    keys = [k[:, :tokens] for k in kept]
    sequence = fused.MixedSequence(TEXT, cos, sin, bias, lengths, lengths)
    layout = StepLayout(sequence, fresh, KVCache())

    def theirs(x, layout):
        with with_layout(transformer, layout):
            found = block(
                hidden_states=x[:, TEXT:], encoder_hidden_states=x[:, :TEXT], temb=temb,
                joint_attention_kwargs={"specedit_layout": layout},
            )  # fmt: skip
        return torch.cat(found, dim=1)

    x = torch.randn(batch, tokens, WIDTH)
    used = torch.arange(tokens) < lengths[:, None]
    assert torch.allclose(run_block(kind, block, x, sequence, keys, temb)[used], theirs(x, layout)[used], atol=2e-6)

    first = TEXT + 8
    order = torch.arange(first, dtype=torch.int32)
    own = order < fresh[:, None]
    moved = torch.randn(batch, first, WIDTH)
    active = layout.active(TEXT, 8)
    before = [k.clone() for k in kept]
    got, expected = run_block(kind, block, moved, active.sequence, keys, temb), theirs(moved, active)
    assert torch.allclose(got[own], expected[own], atol=2e-6)
    rows = torch.arange(tokens + 4) < fresh[:, None]
    for now, then in zip(kept, before):
        assert torch.equal(now[~rows].nan_to_num(), then[~rows].nan_to_num()) and not torch.equal(now[rows], then[rows])


@torch.no_grad()
@pytest.mark.parametrize("made", [False, True], ids=["", "made in inference mode"])
@pytest.mark.parametrize("inference", [False, True], ids=["", "joined in inference mode"])
def test_joined_projections_are_the_same_parameters(inference, made):
    with torch.inference_mode(made):
        transformer, batch = tiny_transformer(), 2
    before = {name: (p, p.clone()) for name, p in transformer.named_parameters()}
    block = transformer.transformer_blocks[1]
    block.attn.to_k.__class__ = Adapted  # is left out, as the other two of its three
    x, temb = torch.randn(batch, TEXT + IMAGE, WIDTH), torch.randn(batch, WIDTH)
    sequence = fused.MixedSequence(TEXT, *tables(1, TEXT + IMAGE))
    kinds = [("double", transformer.transformer_blocks[0]), ("double", block),
             ("single", transformer.single_transformer_blocks[1])]  # fmt: skip
    expected = [run_block(kind, b, x, sequence, None, temb) for kind, b in kinds]
    with torch.inference_mode(inference):
        assert fused.join_projections_(transformer) and not fused.join_projections_(transformer)
    after = dict(transformer.named_parameters())
    assert after.keys() == before.keys()
    for name, (parameter, values) in before.items():
        assert after[name] is parameter and torch.equal(parameter, values) and parameter.is_inference() == made
    for attn, text, joined in ((block.attn, False, False), (block.attn, True, True),
                               (transformer.single_transformer_blocks[0].attn, False, True)):  # fmt: skip
        weight = _as_one([layer.weight for layer in fused._projections(attn, text)])
        assert (weight is not None) == joined
        assert not joined or torch.equal(weight, torch.cat([p.weight for p in fused._projections(attn, text)]))
    for (kind, b), y in zip(kinds, expected):
        assert torch.allclose(run_block(kind, b, x, sequence, None, temb), y, atol=2e-6)
    # what moves weights undoes it
    if made:
        return
    moved = transformer.double()
    attn = moved.single_transformer_blocks[0].attn
    assert _as_one([attn.to_q.weight, attn.to_k.weight, attn.to_v.weight]) is None
    assert torch.equal(attn.to_v.weight, before["single_transformer_blocks.0.attn.to_v.weight"][1].double())


class Adapted(torch.nn.Linear):
    """A linear layer that computes more than its weight and bias say, as an adapter makes it."""

    def forward(self, x):
        return super().forward(x) + x.mean(dim=-1, keepdim=True)


@torch.no_grad()
def test_layers_that_are_not_plain_are_called():
    transformer = tiny_transformer()
    x, temb = torch.randn(2, TEXT + IMAGE, WIDTH), torch.randn(2, WIDTH)
    cos, sin = tables(1, TEXT + IMAGE)
    rotary = tuple(t[0].repeat_interleave(2, -1) for t in (cos, sin))
    for kind, names in (("double", ["attn.to_k", "ff.net.0.proj", "ff_context.net.2"]),
                        ("single", ["proj_mlp", "proj_out", "attn.to_q"])):  # fmt: skip
        block = (transformer.transformer_blocks if kind == "double" else transformer.single_transformer_blocks)[0]
        for name in names:
            block.get_submodule(name).__class__ = Adapted
        expected = torch.cat(block(x[:, TEXT:], x[:, :TEXT], temb, rotary), dim=1)
        got = run_block(kind, block, x, fused.MixedSequence(TEXT, cos, sin), None, temb)
        assert torch.allclose(got, expected, atol=3e-6)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 70), (2, 33)], ids=str)
def test_merged_linear_layers_round_no_worse(random, device, shape, dtype):
    if device.type == "cpu" and dtype == torch.float16:
        pytest.skip("the CPU adds in place in half precision")

    def tensor(*sizes):
        return random(*sizes, dtype=dtype, device=device)

    def layer(out, into):
        made = torch.nn.Linear(into, out, device=device, dtype=dtype)
        made.weight.copy_(tensor(out, into) * into**-0.5)
        made.bias.copy_(tensor(out))
        return made

    a, b = tensor(*shape, 64), tensor(*shape, 256)
    wide, joined = layer(256, 64), layer(64, 320)

    def exact(layer, x):
        return F.linear(x.double(), layer.weight.double(), layer.bias.double())

    eager = F.gelu(wide(a), approximate="tanh")
    assert_within_budget(gelu(wide, a), F.gelu(exact(wide, a), approximate="tanh"), eager)
    both = torch.cat([a, b], dim=-1)
    assert_within_budget(of_both(joined, a, b), exact(joined, both), joined(both))


@torch.no_grad()
def test_half_precision_sums_end_at_the_ends_of_their_range():
    transformer = tiny_transformer().half()
    for block in transformer.single_transformer_blocks:
        block.norm.linear.bias[-WIDTH:] = 2.0  # the gate
        block.proj_out.bias[0] = 6e4
    tokens, embeds = torch.randn(1, IMAGE, 64).half(), torch.randn(1, TEXT, WIDTH).half()
    pooled, timestep, scale = torch.randn(1, 16).half(), torch.tensor([700.0]), torch.tensor([2.5])
    sequence = fused.MixedSequence(TEXT, *tables(1, TEXT + IMAGE))
    modulation = fused.modulation(transformer, timestep, scale, pooled)
    got = fused.fused_forward(transformer, tokens, embeds, modulation, sequence)
    assert got.dtype == torch.float16 and got.isfinite().all()


@pytest.mark.slow
@torch.no_grad()
def test_compiled_blocks_trace_whole_and_write_to_kept_keys():
    transformer, blocks = (
        tiny_transformer(),
        tuple(torch.compile(b, fullgraph=True, backend="aot_eager") for b in fused.BLOCKS),
    )
    temb, buffers = torch.randn(1, WIDTH), StepRunner("compile").buffers
    for tokens in (TEXT + IMAGE, TEXT + IMAGE + 7):  # the second makes the lengths symbols
        lengths, order = torch.tensor([tokens - 2], dtype=torch.int32), torch.arange(tokens, dtype=torch.int32)[None]
        plain = fused.MixedSequence(TEXT, *tables(1, tokens))
        cached = fused.MixedSequence(TEXT, *tables(1, tokens), torch.randn(1, tokens + 3), lengths, lengths + 2, order)
        for kind, module in (("double", transformer.transformer_blocks[0]),
                             ("single", transformer.single_transformer_blocks[0])):  # fmt: skip
            x = torch.randn(1, tokens, WIDTH)
            for sequence in (plain, cached):
                old = [torch.randn(1, tokens + 3, HEADS, DIM) for _ in range(2)] if sequence is cached else None
                # as a run has them, the second pair of two
                new = old and buffers("kept", 4, old[0].shape, torch.float32, torch.device("cpu"))[2:]
                for k, kept in zip(new or (), old or ()):
                    k.copy_(kept)
                got = run_block(kind, module, x, sequence, new, temb, blocks)
                assert torch.allclose(got, run_block(kind, module, x, sequence, old, temb), atol=2e-6)
                assert old is None or all(torch.allclose(a, b, atol=2e-6) for a, b in zip(old, new))
    torch._dynamo.reset()


@pytest.fixture
def norms(monkeypatch):
    """Whether the SiLU was in it, for each call of the op `group_norm`."""
    called, op = [], ops.group_norm

    def watched(*args, silu, **kwargs):
        called.append(silu)
        return op(*args, silu=silu, **kwargs)

    monkeypatch.setattr(ops, "group_norm", watched)
    return called


def with_norms(module):
    """Norms start with weights of one and biases of zero, and would hide which belongs to which."""
    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, torch.nn.GroupNorm):
                norm.weight.normal_(1, 0.3)
                norm.bias.normal_(0, 0.3)
    return module.eval()


def tiny_vae():
    torch.manual_seed(0)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    return with_norms(AutoencoderKL(**blocks, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("served", ["reference", "triton"])
def test_an_autoencoder_with_fused_norms_is_its_own(norms, monkeypatch, device, served):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # or convolutions make more of a last bit
    vae = tiny_vae().to(device)
    pixels, latents = torch.randn(2, 3, 16, 24, device=device), torch.randn(2, 4, 8, 12, device=device)

    def run(vae):
        return vae.encode(pixels).latent_dist.parameters, vae.decode(latents).sample

    expected, before = run(vae), dict(vae.named_modules())
    if served == "triton":
        pytest.importorskip("triton")
        monkeypatch.setenv("SPECEDIT_BACKEND", "triton")
    got = run(with_fused_norms(vae))
    # only the norms of the two attentions have no activation
    assert norms.count(False) == 2
    assert len(norms) == sum(isinstance(m, torch.nn.GroupNorm) for m in before.values())
    for a, b in zip(got, expected):
        assert torch.allclose(a, b, atol=1e-5) and b.std() > 0.1
    assert list(vae.named_modules()) == list(before.items())
    assert all(torch.equal(a, b) for a, b in zip(run(vae), expected))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fewer_roundings_are_no_larger_errors(device, dtype):
    """Channels last, in 16 bits, against float64: biases and residuals that are rounded once do no harm."""
    vae = tiny_vae().to(device, dtype)
    exact = copy.deepcopy(vae).double()
    pixels = torch.randn(2, 3, 32, 48, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    latents = torch.randn(2, 4, 16, 24, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    fused = with_fused_norms(vae)
    for run in (lambda vae, x: vae.encode(x[0]).latent_dist.mode(), lambda vae, x: vae.decode(x[1]).sample):
        expected = run(exact, (pixels.double(), latents.double()))
        own, got = ((run(v, (pixels, latents)).double() - expected).square().mean().sqrt() for v in (vae, fused))
        assert 0 < got <= 1.05 * own


def _calls_of_biases(monkeypatch):
    """(whether there was a residual, whether the shortcut's bias) of each call of the op `add_bias_`."""
    called, op = [], ops.add_bias_

    def watched(x, bias, residual=None, residual_bias=None):
        called.append((residual is not None, residual_bias is not None))
        op(x, bias, residual, residual_bias)

    monkeypatch.setattr(ops, "add_bias_", watched)
    return called


@torch.no_grad()
def test_biases_of_residual_blocks_need_no_launch(monkeypatch):
    vae, called = tiny_vae(), _calls_of_biases(monkeypatch)
    with_fused_norms(vae).decode(torch.randn(1, 4, 8, 12))
    blocks = [m for m in vae.decoder.modules() if isinstance(m, ResnetBlock2D)]
    shortcuts = sum(block.conv_shortcut is not None for block in blocks)
    assert called.count((True, False)) == len(blocks) - shortcuts and called.count((True, True)) == shortcuts > 0
    # post_quant_conv, conv_in, one of an upsampling, conv_out
    assert called.count((False, False)) == 4 == len(called) - len(blocks)


@torch.no_grad()
def test_a_convolution_that_is_watched_keeps_its_bias(monkeypatch):
    """A hook of torch or of a library, another forward: who asks for a convolution's result gets all of it."""
    vae, called, seen = tiny_vae(), _calls_of_biases(monkeypatch), []
    block, latents = vae.decoder.mid_block.resnets[0], torch.randn(1, 4, 8, 12)
    block.conv1.register_forward_hook(lambda conv, args, y: seen.append(y.clone()))
    expected = vae.decode(latents).sample
    assert torch.allclose(with_fused_norms(vae).decode(latents).sample, expected, atol=1e-5)
    assert torch.allclose(seen[0], seen[1], atol=1e-5)
    blocks = sum(isinstance(m, ResnetBlock2D) for m in vae.decoder.modules())
    assert sum(residual for residual, _ in called) == blocks - 1


def test_a_forward_that_is_not_the_librarys_own_is_called():
    """A norm or a block with another forward, on the object or by its class, is no norm that the op may stand for."""

    class Doubled(ResnetBlock2D):
        def forward(self, x, temb):
            return 2 * super().forward(x, temb)

    vae = tiny_vae()
    vae.decoder.mid_block.resnets[0].__class__ = Doubled
    norm = vae.decoder.mid_block.resnets[1].norm1
    norm.forward = lambda x: torch.zeros_like(x)
    z = torch.randn(1, 4, 8, 12)
    with torch.no_grad():
        assert torch.allclose(with_fused_norms(vae).decode(z).sample, vae.decode(z).sample, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [dict(temb_channels=12), dict(temb_channels=12, time_embedding_norm="scale_shift"),
                dict(temb_channels=None, non_linearity="gelu"), dict(temb_channels=None, up=True)],
    ids=["embedding", "shifted", "gelu", "up"],
)  # fmt: skip
def test_an_activation_with_other_uses_stays_apart(norms, options):
    torch.manual_seed(0)
    block = with_norms(ResnetBlock2D(in_channels=8, groups=4, **options))
    x, temb = torch.randn(2, 8, 6, 6), None if options["temb_channels"] is None else torch.randn(2, 12)
    expected = block(x, temb)
    assert torch.allclose(with_fused_norms(block)(x, temb), expected, atol=1e-5)
    assert norms == [options == dict(temb_channels=None, up=True)] * 2


@pytest.fixture(scope="module")
def pipe():
    return SpecEditFluxKontextPipeline.from_pipe(tiny_pipeline())


def mask(columns):
    found = torch.zeros(128, 128)
    found[:, : 16 * columns] = 1
    return found


@pytest.mark.slow
@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
@pytest.mark.parametrize(
    "options",
    [
        dict(stages=(2, 2, 2)),
        dict(stages=(1, 4, 0), finish="locked", kv_refresh=4),
        dict(stages=(1, 4, 0), finish="locked", kv_refresh=2, lock_text=True),
        dict(draft="quarter", preset=4),
        dict(stages=(1, 4, 0), finish="locked", kv_refresh=4, kv_cache_dtype="fp8"),
        dict(stages=(1, 4, 0), finish="locked", kv_refresh=2, lock_text=True, kv_cache_dtype="fp8"),
    ],
    ids=["full", "cached", "locked text", "dense", "fp8", "fp8, locked text"],
)
def test_fused_edits_are_eager_ones(pipe, norms, options, guided):
    extra = dict(negative_prompt=["red"] * 2, true_cfg_scale=2.0) if guided else {}
    if "draft" in options:
        options = dict(options, threshold=-1.0)
    else:
        extra["mask_image"] = [mask(2), mask(4)]
    text = call_options(**extra)
    prompts = [text.pop("prompt"), "a dog"]

    def edit(runner):
        config = paper(runner=runner, **options)
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        images = [tiny_image(seed=0), tiny_image(seed=1)]
        return pipe(image=images, prompt=prompts, generator=generators, specedit=config, **text)

    expected = edit("eager")
    assert not norms
    got = edit("fused")
    assert norms
    assert got.stats.runner == "fused" and expected.stats.runner == "eager"
    assert [s.flops for s in got.stats.steps] == [s.flops for s in expected.stats.steps]
    # in fp8 a number between two steps falls to the one or to the other by its last bits
    atol = 2e-3 if "kv_cache_dtype" in options else 1e-5
    assert torch.allclose(got.images, expected.images, atol=atol)
    assert (got.stats.kv_cache_bytes > 0) == ("kv_refresh" in options) == (expected.stats.kv_cache_bytes > 0)
