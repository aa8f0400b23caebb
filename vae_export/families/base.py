"""The interface of a family of VAEs: the reference model's methods, and the entry in the registry of families."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from runtimes.errors import ConfigError
from runtimes.latent_space import LatentSpace
from runtimes.names import Graph
from runtimes.outputs import AutoencoderKLOutput, AutoencoderTinyOutput, DecoderOutput
from runtimes.posterior import DiagonalGaussianDistribution
from runtimes.tiling.blended import run_tiled
from runtimes.tiling.settings import TilingSettings
from runtimes.tiling.tiler import Tiler
from vae_export.checkpoints.source import Source

Model = TypeVar("Model", bound="ReferenceVae")


class ModelConfig(Protocol):
    """The members that the configs of all families have; AutoencoderKL's is `runtimes.config.VaeConfig`."""

    @property
    def in_channels(self) -> int:
        """Channels of the images that are encoded."""

    @property
    def out_channels(self) -> int:
        """Channels of the images that are decoded."""

    @property
    def latent_channels(self) -> int:
        """Channels of raw latents."""

    @property
    def sample_size(self) -> int:
        """Default side of a tile, in pixels."""

    @property
    def downscale(self) -> int:
        """Pixels per latent, along each side of an image."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, origin: str = "config") -> Any:
        """Read the fields of a diffusers config.json. Raises `ConfigError`, with `origin`, for wrong values."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as diffusers writes them in config.json, `_class_name` first."""

    def to_json(self) -> str:
        """Return the text of a config.json."""


class ReferenceVae(TilingSettings, nn.Module):
    """A reference model in PyTorch, which encodes images in [-1, 1] to latents and decodes latents to images.

    Each family has a subclass with the network, which implements `encode_moments` and `decode_latents`. In the
    docstrings B is the batch, C the channels of raw latents, and f the pixels per latent along each side.
    """

    family: ClassVar[str]  #: diffusers' class name, and the name in `FAMILIES`
    config_class: ClassVar[type]  #: a `ModelConfig`
    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.source = Source(given="memory", kind="memory")
        self._set_up_tiling(config.sample_size, config.downscale)

    def encode_moments(self, x: Tensor) -> Tensor:
        """Run the whole encoder: images [B, in_channels, H, W] -> mean and logvar [B, 2*C, H//f, W//f].

        Families without a posterior return the latents [B, C, H//f, W//f].
        """
        raise NotImplementedError

    def decode_latents(self, z: Tensor) -> Tensor:
        """Run the whole decoder: raw latents [B, C, h, w] -> images [B, out_channels, f*h, f*w], not clipped."""
        raise NotImplementedError

    @property
    def latent_space(self) -> LatentSpace:
        """Shape and normalisation of the latents, from the config; a family may take it from the weights instead."""
        return cast(LatentSpace, self.config.latent_space)

    @property
    def smallest_side(self) -> int:
        """Side in latents of the smallest image on which exports are validated."""
        return 1

    # Loading and saving -------------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls: type[Model], config: Any) -> Model:
        """Create a model with random weights from a config object or a diffusers config dictionary."""
        return cls(config if isinstance(config, cls.config_class) else cls.config_class.from_dict(config))  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(
        cls: type[Model],
        source: str | Path,
        *,
        subfolder: str | None = None,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | None = None,
        local_files_only: bool = False,
    ) -> Model:
        """Load a diffusers directory or Hub repository: config.json and diffusion_pytorch_model.safetensors.

        `subfolder="vae"` selects the VAE of a whole pipeline, `variant="fp16"` the weights of
        diffusion_pytorch_model.fp16.safetensors; without `variant`, the plain file is read, or else the only variant.
        Weights may be split into parts with an index. Weights of any float dtype are converted to fp32.

        Raises `ConfigError` for anything that is not a complete checkpoint of this family.
        """
        hub = _checkpoints("hub").Hub(revision, cache_dir, token, local_files_only)
        return cls._of_this_family(
            _checkpoints("load").load_pretrained(source, subfolder=subfolder, variant=variant, hub=hub)
        )

    @classmethod
    def from_single_file(
        cls: type[Model],
        source: str | Path,
        *,
        config: Any = None,
        scaling_factor: float | None = None,
        shift_factor: float | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | None = None,
        local_files_only: bool = False,
    ) -> Model:
        """Load one .safetensors file: a local path or the URL of a file on the Hub.

        The names of tensors may be those of diffusers or of the original latent-diffusion code, without prefix or below
        `first_stage_model.` or `vae.`, alone or in a whole checkpoint. The architecture is inferred from the shapes.
        The other values (norm groups, scaling and shift) come from the arguments, from `config`, from the config beside
        the file, or from the table of public VAEs. If the scaling stays unknown, `config.scaling_factor` is None, and
        the model supports raw latents only.

        Raises `ConfigError` for anything that is not a complete checkpoint of this family.
        """
        hub = _checkpoints("hub").Hub(revision, cache_dir, token, local_files_only)
        return cls._of_this_family(
            _checkpoints("load").load_single_file(
                source, config=config, scaling_factor=scaling_factor, shift_factor=shift_factor, hub=hub
            )
        )

    @classmethod
    def _of_this_family(cls: type[Model], model: ReferenceVae) -> Model:
        """Return the model. Raises `ConfigError` if it is of another family."""
        if not isinstance(model, cls):
            raise ConfigError(f"{model.source.given} is an {model.family}, not an {cls.family}; load_model takes both")
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and diffusion_pytorch_model.safetensors in diffusers' format."""
        _checkpoints("load").save_pretrained(self, Path(directory))

    # Encoding and decoding ----------------------------------------------------------------------------------------

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Encode images [B, in_channels, H, W] in [-1, 1] to the posterior over latents [B, C, H//f, W//f].

        Returns an `AutoencoderKLOutput` with `latent_dist`, or, for families without a posterior, an
        `AutoencoderTinyOutput` with `latents`. With `return_dict=False`, returns a tuple with that one entry.
        """
        return self._encoded(self._tiler().run(self.encode_moments, x, "encoder"), return_dict)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode raw latents [B, latent_channels, h, w] to images [B, out_channels, f*h, f*w], not clipped.

        `generator` is accepted for compatibility with diffusers and ignored: decoding is deterministic.
        """
        sample = self._tiler().run(self.decode_latents, z, "decoder")
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode images and decode the posterior's mode, or a sample of it with `sample_posterior`."""
        encoded = self.encode(sample)[0]
        if not self.latent_space.posterior:
            z = encoded
        else:
            z = encoded.sample(generator) if sample_posterior else encoded.mode()
        return self.decode(z, return_dict=return_dict)

    def tiled_encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Encode in tiles, for any size and even if tiling is not enabled."""
        return self._encoded(run_tiled(self.encode_moments, x, self._tiler().grid("encoder")), return_dict)

    def tiled_decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Decode in tiles, for any size and even if tiling is not enabled."""
        sample = run_tiled(self.decode_latents, z, self._tiler().grid("decoder"))
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _encoded(self, encoded: Tensor, return_dict: bool) -> Any:
        if not self.latent_space.posterior:
            return AutoencoderTinyOutput(latents=encoded) if return_dict else (encoded,)
        posterior = DiagonalGaussianDistribution(encoded)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def _tiler(self) -> Tiler:
        return Tiler(self, self.config.downscale)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device


class Stage(NamedTuple):
    """A part of the residual stream that is rescaled as a whole: from its first conv to the next resampling."""

    name: str
    entry: nn.Conv2d  #: conv_in, or the previous resampling conv
    entry_name: str
    resnets: Mapping[str, Any]
    attentions: Mapping[str, Any]
    exit_name: str  #: module of the next resampling, whose padded or repeated input still has this scale; "" for none
    norm_out: nn.GroupNorm | None  #: the norm after the last stage


def _checkpoints(module: str) -> Any:
    """Import a module of `vae_export.checkpoints`; not at the top, since it imports the families in turn."""
    return importlib.import_module(f"vae_export.checkpoints.{module}")


def no_fields(model: ReferenceVae) -> Mapping[str, Any]:
    """No further fields."""
    return {}


def as_it_is(model: ReferenceVae) -> ReferenceVae:
    """A model that rewrites take as it is."""
    return model


def unchanged(tensors: Mapping[str, Tensor], origin: str) -> Mapping[str, Tensor]:
    """Tensors that need no check of their own."""
    return tensors


def same_names(names: Iterable[str]) -> dict[str, str]:
    """Map names of tensors to themselves, for files with diffusers' names."""
    return {name: name for name in names}


@dataclass(frozen=True)
class Family:
    """The properties of a family that the common code uses."""

    network: type[ReferenceVae]
    #: exact rewrites that apply: "upsample", "norm", "attention", "last_block", "winograd", "rescale", "tileable"
    rewrites: frozenset[str] = frozenset()
    #: whether names of tensors, without prefix, can only be of this family; None: they are never only of it
    recognises: Callable[[Iterable[str]], bool] | None = None
    #: keys of a file -> {name in diffusers: key in the file} of the VAE's tensors, also in the original code's names
    tensor_names: Callable[[Iterable[str]], Mapping[str, str]] = same_names
    #: shapes of a single file's tensors -> the config fields that they determine; None: single files are not read
    architecture: Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any]] | None = None
    #: (architecture, given=config fields, public=`PublicVae` or None) -> the whole config of a single file
    complete_config: Callable[..., Any] | None = None
    #: (tensors in diffusers names, where they are from) -> the same, checked for what is particular to the family
    checked_tensors: Callable[[Mapping[str, Tensor], str], Mapping[str, Tensor]] = unchanged
    #: model -> fields that other programs expect in the config.json beside the decoder, in addition to the config's own
    decoder_fields: Callable[[Any], Mapping[str, Any]] = no_fields
    #: model -> the same, in place, with its upsamplings as modules `Upsample` that "upsample" folds
    prepared: Callable[[Any], Any] = as_it_is
    #: (model, graph) -> how far in latents a result depends on its surroundings; None: on the whole image
    halo: Callable[[Any, Graph], int | None] | None = None
    #: the stages of a graph's residual stream in the order of the computation, for "rescale"
    stages: Callable[[Any, Graph], Iterator[Stage]] | None = None
    #: (config, graph, batch, height, width, form) -> live tensor elements at each place, to estimate device memory
    activation_places: Callable[..., Iterator[int]] | None = None

    @property
    def name(self) -> str:
        """The class name in diffusers."""
        return self.network.family

    @property
    def config_class(self) -> Any:
        """The class of its config, a `ModelConfig`."""
        return self.network.config_class
