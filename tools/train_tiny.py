"""Train the embedded model (vae_export/assets/tiny) on the public-domain and CC0 photographs in scikit-image.

    python tools/train_tiny.py --minutes 40 --out vae_export/assets/tiny

Nothing is downloaded: scikit-image ships the photographs in its wheel. Two photographs are never trained on and measure
the result: `coffee` (scikit-image) and `flower.jpg` (scikit-learn). Writes config.json with the scaling and shift
factors of the latents, fp16 weights, and training.json with what was done and reached.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage import data as skimage_data
from sklearn.datasets import load_sample_image
from torch import Tensor

from runtimes.config import VaeConfig
from vae_export.families.autoencoder_kl import AutoencoderKL

# Photograph -> its licence, as the docstrings of skimage.data state it.
TRAINING_PHOTOS = {
    "astronaut": "public domain (NASA)",
    "brick": "CC0 (CC0Textures)",
    "camera": "CC0 (Lav Varshney)",
    "cell": "CC0",
    "chelsea": "CC0 (Stefan van der Walt)",
    "coins": "no known copyright restrictions (Brooklyn Museum)",
    "grass": "CC0 (linolafett)",
    "gravel": "CC0 (CC0Textures)",
    "hubble_deep_field": "public domain (NASA)",
    "immunohistochemistry": "no known copyright restrictions, public domain",
    "retina": "CC0",
    "rocket": "public domain (SpaceX)",
}
# Colour photographs of everyday things teach more than textures and microscopes.
WEIGHTS = {"astronaut": 4.0, "chelsea": 4.0, "rocket": 2.0, "immunohistochemistry": 1.5, "hubble_deep_field": 1.5}
SCALES = (1.0, 0.7, 0.5, 0.35)

CONFIG = VaeConfig(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(32, 48, 64, 96),
    layers_per_block=1,
    latent_channels=16,
    norm_num_groups=16,
    sample_size=256,
    scaling_factor=1.0,
    force_upcast=False,
    use_quant_conv=False,
    use_post_quant_conv=False,
)


def to_tensor(photo: np.ndarray) -> Tensor:
    """uint8 [H, W] or [H, W, 3] -> float [3, H, W] in [-1, 1], H and W multiples of 8."""
    rgb = np.stack([photo] * 3, axis=-1) if photo.ndim == 2 else photo[..., :3]
    height, width = (side - side % 8 for side in rgb.shape[:2])
    return torch.from_numpy(rgb[:height, :width].copy()).permute(2, 0, 1).float() / 127.5 - 1.0


def pyramid(photo: np.ndarray, smallest: int) -> list[Tensor]:
    image = Image.fromarray(photo).convert("RGB")
    sizes = [(round(image.width * scale), round(image.height * scale)) for scale in SCALES]
    return [
        to_tensor(np.asarray(image.resize(size, Image.Resampling.LANCZOS))) for size in sizes if min(size) > smallest
    ]


class Crops:
    """Random crops, turned, flipped, with colours permuted and contrast changed."""

    def __init__(self, seed: int, largest: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.photos = {name: pyramid(getattr(skimage_data, name)(), largest + 8) for name in TRAINING_PHOTOS}
        weights = np.array([WEIGHTS.get(name, 1.0) for name in self.photos])
        self.probabilities = weights / weights.sum()

    def crop(self, side: int) -> Tensor:
        rng = self.rng
        levels = list(self.photos.values())[rng.choice(len(self.photos), p=self.probabilities)]
        image = levels[rng.integers(len(levels))]
        top, left = (int(rng.integers(size - side + 1)) for size in image.shape[1:])
        x = torch.rot90(image[:, top : top + side, left : left + side], int(rng.integers(4)), dims=(1, 2))
        if rng.random() < 0.5:
            x = x.flip(2)
        if rng.random() < 0.5:
            x = x[torch.from_numpy(rng.permutation(3))]
        if rng.random() < 0.7:  # per-channel gain and offset: the few photos would else fix the palette
            gain = torch.from_numpy(rng.uniform(0.6, 1.3, (3, 1, 1)).astype(np.float32))
            offset = torch.from_numpy(rng.uniform(-0.3, 0.3, (3, 1, 1)).astype(np.float32))
            x = x * gain + offset
        if rng.random() < 0.1:
            x = -x
        return x.clamp(-1, 1)

    def batch(self, size: int, side: int) -> Tensor:
        return torch.stack([self.crop(side) for _ in range(size)])


def held_out() -> dict[str, Tensor]:
    return {
        "coffee": to_tensor(skimage_data.coffee())[None],
        "flower": to_tensor(load_sample_image("flower.jpg"))[None],
    }


@torch.no_grad()
def psnr(model: AutoencoderKL, photo: Tensor) -> float:
    """dB between photo and reconstruction through the posterior's mode, both as 8-bit values."""
    restored = model(photo)[0].clamp(-1, 1)
    error = ((restored + 1) * 127.5).round() - ((photo + 1) * 127.5).round()
    return 10 * math.log10(255**2 / error.pow(2).mean().item())


@torch.no_grad()
def latent_statistics(model: AutoencoderKL, crops: Crops, count: int = 1000) -> tuple[float, float]:
    """(scaling_factor, shift_factor): 1 / standard deviation and mean of the latents of the training photos."""
    latents = torch.cat([model.encode(crops.batch(1, 128))[0].sample() for _ in range(count)])
    return round(1 / latents.std().item(), 4), round(latents.mean().item(), 4)


def start_as_identity(model: AutoencoderKL) -> None:
    """Residual branches begin at zero and resampling convolutions orthogonal."""
    for name, module in model.named_modules():
        if name.endswith((".conv2", ".to_out.0")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
        elif name.endswith((".conv", "conv_in")):
            torch.nn.init.orthogonal_(module.weight)


@torch.no_grad()
def start_encoder_at_principal_components(model: AutoencoderKL, crops: Crops) -> None:
    """Let the encoder begin as the best linear one: the 16 principal components of 8x8 patches.

    The residual stream carries the patch unchanged: each strided convolution moves 2x2 pixels into channels, and the
    last projects the 192 values. Two things stand in the way of linearity at the end. GroupNorm divides by the
    deviation of each group: two constant channels in it, far larger than the rest, make that a constant too. SiLU is
    undone by carrying every component twice, with both signs: silu(x) - silu(-x) = x.
    """
    encoder: Any = model.encoder  # blocks of a ModuleList have no types
    side, constant = 8, 30.0
    tiled = (crops.batch(1, 96).unfold(2, side, side).unfold(3, side, side) for _ in range(300))
    patches = torch.cat([t.reshape(3, -1, side * side) for t in tiled], dim=1)
    patches = patches.permute(1, 0, 2).reshape(-1, 192)  # channel, row, column
    mean = patches.mean(0)
    basis = torch.linalg.svd(patches - mean, full_matrices=False).Vh[:16]  # [16, 192]
    basis = basis / ((patches - mean) @ basis.T).std()

    def clear(layer: Any) -> Any:
        """Set a convolution to zero; untyped, since PyTorch's types say that its bias may be missing."""
        layer.weight.zero_()
        layer.bias.zero_()
        return layer

    def copy_first(layer: torch.nn.Conv2d, count: int) -> None:
        middle = layer.weight.shape[-1] // 2
        layer.weight[range(count), range(count), middle, middle] = 1.0

    copy_first(clear(encoder.conv_in), 3)
    for level, count in ((0, 3), (1, 12)):  # channel c at row r and column s of 2x2 becomes channel 4c + 2r + s
        conv = clear(encoder.down_blocks[level].downsamplers[0].conv)
        for c in range(count):
            for r in range(2):
                for s in range(2):
                    conv.weight[4 * c + 2 * r + s, c, r, s] = 1.0
    copy_first(clear(encoder.down_blocks[1].resnets[0].conv_shortcut), 12)
    copy_first(clear(encoder.down_blocks[2].resnets[0].conv_shortcut), 48)
    last = clear(encoder.down_blocks[2].downsamplers[0].conv)
    for c in range(3):
        for y in range(8):
            for x in range(8):
                # Bits of y and x: the lowest was moved first, the highest is what the last convolution sees.
                inner = 4 * (4 * c + 2 * (y % 2) + x % 2) + 2 * (y // 2 % 2) + x // 2 % 2
                last.weight[:16, inner, y // 4, x // 4] = basis[:, 64 * c + 8 * y + x]
    last.bias[:16] = -(basis @ mean)

    shortcut, out = clear(encoder.down_blocks[3].resnets[0].conv_shortcut), clear(encoder.conv_out)
    encoder.conv_norm_out.weight.fill_(constant / math.sqrt(3))
    for component in range(16):
        plus = 6 * (component // 2) + 2 * (component % 2)
        for channel, sign in ((plus, 1.0), (plus + 1, -1.0)):
            shortcut.weight[channel, component] = sign
            out.weight[component, channel, 1, 1] = sign
    for group in range(16):
        shortcut.bias[6 * group + 4] = constant
        shortcut.bias[6 * group + 5] = -constant
    out.bias[16:] = -8.0  # logvar


def train(minutes: float, out: Path, seed: int, batch: int, peak_rate: float) -> None:
    torch.manual_seed(seed)
    crops = Crops(seed, largest=160)
    model = AutoencoderKL(CONFIG)
    start_as_identity(model)
    start_encoder_at_principal_components(model, crops)
    average = AutoencoderKL(CONFIG).eval()
    average.load_state_dict(model.state_dict())
    parts = [{"params": model.decoder.parameters(), "share": 1.0}, {"params": model.encoder.parameters(), "share": 0.1}]
    optimizer = torch.optim.AdamW(parts, lr=peak_rate, betas=(0.9, 0.99), weight_decay=1e-4)

    start, step, next_report = time.monotonic(), 0, 5.0
    while (elapsed := (time.monotonic() - start) / 60) < minutes:
        progress = elapsed / minutes
        rate = peak_rate * min(1.0, (step + 1) / 200) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        model.encoder.requires_grad_(progress > 0.4)  # the decoder first learns to read what is there
        side = int(crops.rng.choice([96, 128, 160], p=[0.5, 0.3, 0.2]))
        x = crops.batch(max(2, batch * 96 * 96 // (side * side)), side)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(x)[0]
            restored = model.decode(posterior.sample())[0].float()
        # The square root keeps smooth photographs, whose errors are small, in the sum.
        error = (restored - x).pow(2).mean(dim=(1, 2, 3)).add(1e-5).sqrt().mean()
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        loss = error + 1e-5 * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            for kept, new in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
        if elapsed >= next_report:
            save(average, crops, out, {"seed": seed, "steps": step, "minutes": round(elapsed, 1)})
            next_report = elapsed + 5.0
    save(average, crops, out, {"seed": seed, "steps": step, "minutes": minutes})


def save(model: AutoencoderKL, crops: Crops, out: Path, facts: dict[str, float]) -> None:
    """Write the model as it stands, with fp16 weights, and what those very weights reach on the held-out photos."""
    half = AutoencoderKL(CONFIG).eval()
    weights = {name: tensor.half() for name, tensor in model.state_dict().items()}
    half.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    reached = {name: round(psnr(half, photo), 2) for name, photo in held_out().items()}
    scaling_factor, shift_factor = latent_statistics(half, crops)
    config = CONFIG.to_dict() | {"scaling_factor": scaling_factor, "shift_factor": shift_factor}
    report = {**facts, "held_out_psnr_db": reached, "photos": TRAINING_PHOTOS}

    out.mkdir(parents=True, exist_ok=True)
    save_file(
        {n: t.contiguous() for n, t in weights.items()}, out / "diffusion_pytorch_model.safetensors", {"format": "pt"}
    )
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"{facts} {reached} scaling {scaling_factor} shift {shift_factor}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=5, help="crops of 96x96 a step; larger crops come in fewer")
    parser.add_argument("--rate", type=float, default=4e-4, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.minutes, arguments.out, arguments.seed, arguments.batch, arguments.rate)
