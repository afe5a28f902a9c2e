# SPDX-License-Identifier: Apache-2.0
"""Trains the editor's autoencoder on crops of scenes at 512, 256 and 128 pixels a side. Writes RUN_DIR/vae.

python bench/quality/train_vae.py --seconds 165
python bench/quality/train_vae.py --seconds 200 --again --lr 8e-4    # a warm restart from RUN_DIR/vae
python bench/quality/train_vae.py --family klein --start specedit_kernels/assets/tiny_kontext/vae --seconds 0
    # another family's weights as they are, with this family's scale of the latents
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from families import FAMILIES, load_vae
from models import parameter_count
from runtime import RUN_DIR, Clock, autocast, device, load_checkpoint, log, memory, save_checkpoint
from safetensors.torch import load_file
from scenes import Renderer, sample
from stream import EditStream

CROP = 128
SIZES = ((512, 0.5), (256, 0.3), (128, 0.2))


class Pictures:
    """Rendered sources and targets on the device, a few of them replaced at each step: drawing every crop's picture
    afresh takes longer than the training step."""

    def __init__(self, renderer, stream, generator, dev, count=96, fresh=2):
        self.renderer, self.stream, self.generator, self.fresh = renderer, stream, generator, fresh
        dtype = torch.float16 if dev.type == "cuda" else torch.float32
        self.rings = {size: torch.empty(2 * count, 3, size, size, device=dev, dtype=dtype) for size, _ in SIZES}
        self.at = dict.fromkeys(self.rings, 0)
        for size in self.rings:
            for _ in range(0, count, 8):
                self.draw(size, 8)

    def draw(self, size, scenes):
        rendered = self.renderer(self.stream.take(scenes)[0], size)
        ring, at = self.rings[size], self.at[size]
        rows = (torch.arange(at, at + 2 * scenes) % len(ring)).to(ring.device)
        ring[rows] = torch.cat([rendered.source, rendered.target]).to(ring.dtype)
        self.at[size] = (at + 2 * scenes) % len(ring)

    def crops(self, count):
        """[count, 3, CROP, CROP] in [-1, 1], of one size of picture."""
        pick = torch.multinomial(torch.tensor([share for _, share in SIZES]), 1, generator=self.generator).item()
        size = SIZES[pick][0]
        self.draw(size, self.fresh * (512 // size))
        ring = self.rings[size]
        rows = torch.randint(len(ring), (count,), generator=self.generator).tolist()
        corners = torch.randint(size - CROP + 1, (count, 2), generator=self.generator).tolist()
        out = [ring[row, :, y : y + CROP, x : x + CROP] for row, (y, x) in zip(rows, corners)]
        return torch.stack(out).float() * 2 - 1


def gradient_loss(a, b):
    return ((a.diff(dim=3) - b.diff(dim=3)).abs().mean() + (a.diff(dim=2) - b.diff(dim=2)).abs().mean()) / 2


def psnr(a, b):
    """Of pictures in [-1, 1], clamped: per picture, dB."""
    error = ((a.clamp(-1, 1) - b.clamp(-1, 1)) / 2).square().mean((1, 2, 3))
    return -10 * error.clamp(min=1e-10).log10()


@torch.no_grad()
def normalise_latents(family, vae, renderer, generator, dev, count, size=512):
    """Tells the autoencoder how its latents spread."""
    parts = []
    for _ in range(4):
        x = renderer(sample(max(1, count // 4), generator), size).target.to(dev) * 2 - 1
        with autocast(dev):
            parts.append(family.posterior(vae, x).mode().float())
    z = torch.cat(parts)
    deviation = z.std(dim=(0, 2, 3))
    family.set_scale(vae, z)
    log(f"latent deviations before: {deviation.min():.2f} to {deviation.max():.2f}")


@torch.no_grad()
def report(family, vae, renderer, dev, count, sizes=(512, 256, 128)):
    """PSNR of held-out pictures by size, dB."""
    out = {}
    for size in sizes:
        edits = sample(count, torch.Generator().manual_seed(1), held_out=True)
        x = renderer(edits, size, held_out=True).target.to(dev) * 2 - 1
        values = []
        for part in x.split(8):
            with autocast(dev):
                values.append(psnr(family.decode(vae, family.posterior(vae, part).mode()).float(), part))
        out[size] = torch.cat(values).mean().item()
    return out


def take_weights(vae, folder):
    """Encoder and decoder of another autoencoder of the same shapes; what else there is stays."""
    state = {}
    for path in folder.glob("*.safetensors"):
        state |= {k: v.float() for k, v in load_file(path).items() if k.startswith(("encoder.", "decoder."))}
    missing, unexpected = vae.load_state_dict(state, strict=False)
    lost = [name for name in missing if name.startswith(("encoder.", "decoder."))]
    if lost or unexpected:
        raise ValueError(f"{folder}: expected the weights of {type(vae).__name__}, got {lost + unexpected} otherwise")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="flux")
    parser.add_argument("--seconds", type=float, default=165)
    parser.add_argument("--tail", type=float, default=20)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=4, help="processes that draw scenes")
    parser.add_argument("--report-count", type=int, default=32)
    parser.add_argument("--pictures", type=int, default=96, help="scenes of each size kept on the device")
    parser.add_argument("--again", action="store_true", help="go on from RUN_DIR/vae, which is replaced at the end")
    parser.add_argument("--start", type=Path, help="an autoencoder of the same shapes whose weights are taken")
    args = parser.parse_args()
    there = (RUN_DIR / "vae" / "config.json").exists()
    if there and not args.again:
        log("vae: already there")
        return
    dev, family = device(), FAMILIES[args.family]
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    renderer, stream = Renderer(dev), EditStream(args.seed, 32, args.workers)
    pictures = Pictures(renderer, stream, generator, dev, args.pictures) if args.seconds else None
    vae = load_vae(family, RUN_DIR / "vae") if there else family.make_vae()
    if args.start is not None:
        take_weights(vae, args.start)
    vae.to(dev).train()
    log(f"vae: {parameter_count(vae) / 1e6:.2f} M parameters on {dev}")
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=dev.type == "cuda"
    )
    checkpoint = RUN_DIR / "vae.pt"
    step, elapsed = 0, 0.0
    if checkpoint.exists():
        state = load_checkpoint(checkpoint)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        step, elapsed = state["step"], state["elapsed"]
        generator.manual_seed(args.seed + step)
        log(f"vae: resumed at step {step}")
    clock = Clock(args.seconds, elapsed, args.tail)
    batch, logged, saved, total = args.batch, time.perf_counter(), time.perf_counter(), torch.zeros((), device=dev)
    since = 0
    while pictures is not None and (not clock.done() or step == 0):
        warm = min(1.0, (step + 1) / 100)
        fall = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * max(0.0, (clock.fraction - 0.2) / 0.8)))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm * min(fall, clock.decay(0.999, 0.02))
        try:
            x = pictures.crops(batch)
            with autocast(dev):
                posterior = family.posterior(vae, x)
                z = posterior.sample()
                y = family.decode(vae, z)
                coarse = None
                if step % 3 == 0:  # coarse tokens of a mixed-resolution run are averages of latents
                    factor = 2 if step % 2 else 4
                    coarse = family.decode(vae, F.avg_pool2d(z, factor)).float()
            y = y.float()
            loss = (y - x).abs().mean() + 0.5 * gradient_loss(y, x) + 0.5 * F.mse_loss(y, x)
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            loss = loss + 1e-4 * 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
            if coarse is not None:
                loss = loss + 0.25 * (coarse - F.avg_pool2d(x, factor)).abs().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        except torch.cuda.OutOfMemoryError:
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            batch = max(1, batch // 2)
            log(f"vae: out of memory, batch {batch} from here")
            continue
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for p in vae.parameters():
            if p.grad is not None:
                torch.nan_to_num_(p.grad, 0.0, 0.0, 0.0)
        optimizer.step()
        step, since, total = step + 1, since + 1, total + loss.detach()
        now = time.perf_counter()
        if now - logged > 10:
            clock.poll_stop()
            log(
                f"vae step {step} {clock.elapsed:.0f}/{args.seconds:.0f} s loss {total.item() / since:.4f} "
                f"{(now - logged) / since * 1e3:.0f} ms/step {memory()}"
            )
            logged, since, total = now, 0, torch.zeros((), device=dev)
        if now - saved > 60:
            save_checkpoint(
                {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "elapsed": clock.elapsed},
                checkpoint,
            )
            saved = now
    vae.eval()
    normalise_latents(family, vae, renderer, generator, dev, count=args.report_count)
    scores = report(family, vae, renderer, dev, args.report_count)
    log(f"vae done: {step} steps; held-out PSNR " + ", ".join(f"{s} px {v:.2f} dB" for s, v in scores.items()))
    # A folder appears under its name only when it is whole.
    staging = RUN_DIR / "vae.part"
    vae.save_pretrained(staging)
    if there:
        (RUN_DIR / "vae").rename(RUN_DIR / f"vae.{int(time.time())}")
    staging.rename(RUN_DIR / "vae")
    checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
