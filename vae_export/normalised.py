"""A view of a model whose latents are normalised, for graphs with `--latents normalised`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from runtimes.latent_space import LatentSpace
from vae_export.families.base import ReferenceVae


class NormalisedVae(ReferenceVae):
    """A model that encodes to, and decodes from, the latents of a diffusion model: `latent_space` says how.

    Encoding gives the mode of the posterior, normalised, [B, C * p * p, H/(f*p), W/(f*p)]; decoding takes the same. The
    conversion is computed in fp32 for any dtype of the model: squares of p x p positions become channels, each with its
    own factor and shift. Its constants are buffers, which neither simulated half precision nor `to` rounds.
    """

    def __init__(self, model: ReferenceVae) -> None:
        space = model.latent_space
        space.check_known()
        super().__init__(model.config)
        self.model, self.source, self.family = model, model.source, model.family  # type: ignore[misc]
        self._set_up_tiling(self.tile_sample_min_size, space.normalised_factor)
        multiply, add = (torch.tensor(values, dtype=torch.float64) for values in (space.multiply, space.add))
        # Output channel c*p*p + row*p + column reads the position (row, column) of the squares of channel c.
        places = torch.eye(space.patch**2, dtype=torch.float64).repeat(space.channels, 1)
        weight = places.reshape(-1, 1, space.patch, space.patch) * multiply.reshape(-1, 1, 1, 1)
        self.register_buffer("weight", weight.float())
        self.register_buffer("bias", (-add * multiply).float())
        self.register_buffer("divided", (1 / multiply).reshape(1, -1, 1, 1).float())
        self.register_buffer("add", add.reshape(1, -1, 1, 1).float())
        self._space = space

    weight: Tensor
    bias: Tensor
    divided: Tensor
    add: Tensor

    @property
    def latent_space(self) -> LatentSpace:
        """The latents that this view takes and gives, which need no further normalisation."""
        return self._space.as_normalised

    @property
    def smallest_side(self) -> int:
        """Side in normalised latents of the smallest image that exports are validated on."""
        return -(-self.model.smallest_side // self._space.patch)

    def encode_moments(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, H, W] -> normalised latents, float32 [B, C * p * p, H/(f*p), W/(f*p)]."""
        raw = self.model.encode_moments(x)[:, : self._space.channels].float()
        # A convolution rather than pixel_unshuffle, which would bind the size of traced graphs to multiples of p.
        return F.conv2d(raw, self.weight, self.bias, stride=self._space.patch, groups=self._space.channels)

    def decode_latents(self, z: Tensor) -> Tensor:
        """Normalised latents [B, C * p * p, h, w] -> images [B, out_channels, f*p*h, f*p*w]."""
        raw = F.pixel_shuffle(z.float() * self.divided + self.add, self._space.patch)
        return self.model.decode_latents(raw.to(self.model.dtype))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the model's weights."""
        return self.model.dtype


def as_written(model: ReferenceVae, latents: str) -> ReferenceVae:
    """The model as graphs with these latents compute it: itself for "raw", its view for "normalised"."""
    return NormalisedVae(model) if latents == "normalised" else model
