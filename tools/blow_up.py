"""Give a model activations that overflow fp16, as those of SDXL's VAE do, without changing what it computes.

    python -m tools.blow_up OUT

writes the embedded model, blown up, as a diffusers directory: `vae-export ranges OUT` shows it, and
`vae-export --to onnx --precision fp16 --model OUT` rescues it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import torch

from vae_export.checkpoints.load import load_model
from vae_export.families.autoencoder_kl import AutoencoderKL, stages

Draw = Callable[[float, float], float]


def blown_up(model: AutoencoderKL, draw: Draw, *, with_eps: bool = True) -> AutoencoderKL:
    """The same function with activations too large for fp16: linear parts carry a gain, every eps its square.

    `draw(low, high)` gives a gain between 2**low and 2**high; gains that are no powers of two make fp32 round anew.
    `with_eps=False` leaves eps alone, since no checkpoint stores it: the function is then almost the same.
    """
    model = copy.deepcopy(model)
    squared = 2 if with_eps else 0
    for side in ("encoder", "decoder"):
        before = 1.0
        for stage in stages(model, side):
            stream = draw(14, 18)
            stage.entry.weight *= stream / before
            assert stage.entry.bias is not None
            stage.entry.bias *= stream
            for resnet in stage.resnets.values():
                inner = draw(14, 20)
                resnet.norm1.eps *= stream**squared
                resnet.conv1.weight *= inner
                resnet.conv1.bias *= inner
                resnet.norm2.eps *= inner**squared
                resnet.conv2.weight *= stream
                resnet.conv2.bias *= stream
                if resnet.conv_shortcut is not None:
                    resnet.conv_shortcut.bias *= stream
            for attention in stage.attentions.values():
                values, queries = draw(14, 20), draw(16, 20)
                attention.group_norm.eps *= stream**squared
                attention.to_v.weight *= values
                attention.to_v.bias *= values
                attention.to_out[0].weight *= stream / values
                attention.to_out[0].bias *= stream
                attention.to_q.weight *= queries
                attention.to_q.bias *= queries
                attention.to_k.weight /= queries
                attention.to_k.bias /= queries
            if stage.norm_out is not None:
                stage.norm_out.eps *= stream**squared
            before = stream
    return model


def gains(seed: int, powers_of_two: bool) -> Draw:
    """Random gains from a seed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> float:
        exponent = torch.rand(1, generator=generator).item() * (high - low) + low
        return 2.0 ** (round(exponent) if powers_of_two else exponent)

    return draw


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    embedded = load_model()
    assert isinstance(embedded, AutoencoderKL)
    blown_up(embedded, gains(seed=0, powers_of_two=False), with_eps=False).save_pretrained(sys.argv[1])
