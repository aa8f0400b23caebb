"""A bundle in the place of a diffusers pipeline's VAE.

    from vae_export.diffusers import as_diffusers_vae

    pipe.vae = as_diffusers_vae(open_vae("sdxl"))

The result is an `AutoencoderKL` of diffusers as far as a pipeline can tell: it passes its type checks, has its config,
gives its output classes, and draws the same latents from the same generator.

The name of this module is that of the library that it serves: with absolute imports, `diffusers` is always the latter.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from runtimes import VaeRuntime
from runtimes.config import VaeConfig
from runtimes.errors import ConfigError, NotInstalled

try:
    from diffusers import AutoencoderKL
    from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput
    from diffusers.utils.accelerate_utils import apply_forward_hook
except ImportError:
    raise NotInstalled("diffusers is not installed: pip install 'vae-export[diffusers]'") from None

__all__ = ["DiffusersVae", "as_diffusers_vae"]

INTERFACE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def as_diffusers_vae(runtime: VaeRuntime, *, device: str | torch.device | None = None) -> DiffusersVae:
    """The opened bundle as the `vae` of a diffusers pipeline.

    `device` is where the pipeline's tensors are; by default where the runtime works: its GPU, or the CPU. Give it to
    decode on the CPU what a pipeline on a GPU has made: tensors are then copied through the host.

    Raises `ConfigError` for a bundle whose scaling factor is not known, or that takes pixels (`--io uint8`).
    """
    return DiffusersVae(runtime, device=device)


class _EqualToAutoencoderKL(type(AutoencoderKL)):  # type: ignore[misc]  # diffusers is not typed
    """The type of `DiffusersVae`, for `==` and `in` the same as diffusers' `AutoencoderKL`.

    `from_pipe` keeps a component only if `type(component) in (AutoencoderKL,)`, where a subclass does not count. The
    hash stays the class's own: dictionaries and sets of classes keep the two apart.
    """

    def __eq__(cls, other: object) -> bool:
        return cls is other or other is AutoencoderKL

    def __hash__(cls) -> int:
        return type.__hash__(cls)


class DiffusersVae(AutoencoderKL, metaclass=_EqualToAutoencoderKL):  # type: ignore[misc]
    """An `AutoencoderKL` of diffusers whose encoder and decoder are those of an opened bundle, `runtime`.

    Tensors may be of any float type and on any device; results are of the same, computed in the bundle's precision on
    the runtime's device. Where that is the tensors' device, nothing is copied. No gradients flow: a warning says so
    where one was asked for.

    `dtype` and `device` are what pipelines give to it, and nothing else follows from them: `to(torch.float16)` changes
    `dtype`, not the precision, which is fixed in the bundle. It can be moved between its device and the CPU, as
    offloading does, which moves nothing but the mark; another device is refused (`ConfigError`).

    Copies and pickles, also those of a pipeline that holds it, open the bundle again: see `VaeRuntime`.

    Tiling and slicing are the runtime's, with all of its options; so are `tile_latent_min_size` and its kin.

    It has no weights in PyTorch: `save_pretrained` is refused, and closing the runtime is up to whoever opened it.
    """

    def __init__(self, runtime: VaeRuntime, *, device: str | torch.device | None = None) -> None:
        if not isinstance(runtime, VaeRuntime):
            raise ConfigError(f"as_diffusers_vae takes what open_vae returns, not {type(runtime).__name__}")
        tensors = [tensor for graph in runtime.spec.values() for tensor in (graph.input, graph.output)]
        if any(tensor.dtype == "uint8" for tensor in tensors):
            raise ConfigError("pipelines give and take floats, and this bundle takes pixels; export without --io uint8")
        if not isinstance(runtime.config, VaeConfig):
            raise ConfigError(
                f"this bundle is of an {runtime.manifest.family}, and pipelines take an AutoencoderKL in its place"
            )
        if runtime.config.scaling_factor is None:
            raise ConfigError("the bundle does not say its scaling_factor, which pipelines need; export it with one")
        super(AutoencoderKL, self).__init__()  # not its own, which makes a network
        fields = {name: value for name, value in runtime.config.to_dict().items() if not name.startswith("_")}
        self.register_to_config(**fields)
        self.runtime = runtime
        dtype = getattr(torch, runtime.spec["decoder"].output.dtype)
        self.interface = _Interface(torch.empty(0, dtype=dtype, device=device or _device_of(runtime)))
        self._home = self.interface.marker.device
        self.eval()

    # Encoding and decoding ------------------------------------------------------------------------------------------

    @apply_forward_hook  # type: ignore[untyped-decorator]  # accelerate's, which offloads the model before
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Images, float [B, in_channels, H, W] in [-1, 1] -> diffusers' posterior over latents [B, C, H/f, W/f].

        Raises `ShapeError` where H or W is not a multiple of f.
        """
        posterior = DiagonalGaussianDistribution(self._moments(x))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Raw latents, float [B, latent_channels, h, w] -> images [B, out_channels, f*h, f*w], not clipped.

        `generator` is not used: decoding is deterministic.
        """
        sample = self._sample(z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _moments(self, x: Tensor) -> Tensor:
        moments: Tensor = self.runtime.encode(x)[0].parameters
        return moments.to(x.dtype)

    def _sample(self, z: Tensor) -> Tensor:
        sample: Tensor = self.runtime.decode(z)[0]
        return sample.to(z.dtype)

    # Where tensors are, and of what type ----------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DiffusersVae:
        """What `to`, `half`, `cuda` and the like come down to; `fn` converts a parameter."""
        marker = self.interface.marker
        runs = f"this VAE runs in {self.runtime.backend} on {getattr(self.runtime, 'device', 'cpu')}"
        elsewhere = (
            f"{runs}, and the pipeline's tensors are on {marker.device}: neither can be moved. Open the bundle with "
            "open_vae(..., device=...), or say where the tensors are with as_diffusers_vae(..., device=...)"
        )
        try:
            moved = fn(marker)
        except (RuntimeError, AssertionError) as error:  # PyTorch without that device
            raise ConfigError(f"{elsewhere} ({error})") from None
        if not any(_same_device(moved.device, other) for other in (marker.device, self._home, torch.device("cpu"))):
            raise ConfigError(elsewhere)
        if moved.dtype not in INTERFACE_DTYPES:
            raise ConfigError(f"{runs} in {self.runtime.precision}: it takes and gives no {moved.dtype}")
        super()._apply(fn, recurse)
        return self

    # What pipelines find inside -------------------------------------------------------------------------------------

    @property
    def encoder(self) -> nn.Module:
        """Images -> moments: the whole encoder graph. `quant_conv` behind it is an identity."""
        return _Graph(self.interface, self._moments)

    @property
    def decoder(self) -> nn.Module:
        """Raw latents -> images: the whole decoder graph. `post_quant_conv` before it is an identity."""
        return _Graph(self.interface, self._sample)

    @property
    def quant_conv(self) -> nn.Module | None:
        return self.interface if self.config.use_quant_conv else None

    @property
    def post_quant_conv(self) -> nn.Module | None:
        """Pipelines that upcast look for the type of its parameters."""
        return self.interface if self.config.use_post_quant_conv else None

    # Tiling and slicing ---------------------------------------------------------------------------------------------

    def enable_tiling(self, use_tiling: bool = True, tiling: str = "blended") -> None:
        """As in diffusers; with `tiling`, as the runtime's `enable_tiling`."""
        if use_tiling:
            self.runtime.enable_tiling(tiling)
        else:
            self.runtime.disable_tiling()

    def disable_tiling(self) -> None:
        self.runtime.disable_tiling()

    def enable_slicing(self) -> None:
        self.runtime.enable_slicing()

    def disable_slicing(self) -> None:
        self.runtime.disable_slicing()

    def tiled_encode(self, x: Tensor, return_dict: bool = True) -> NoReturn:
        raise ConfigError("tiled_encode is a part of diffusers' own VAE: enable_tiling() and encode do it here")

    def tiled_decode(self, z: Tensor, return_dict: bool = True) -> NoReturn:
        raise ConfigError("tiled_decode is a part of diffusers' own VAE: enable_tiling() and decode do it here")

    # Files ----------------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> NoReturn:
        """Refused with `ConfigError`: what runs is a bundle."""
        raise ConfigError(
            f"{save_directory} was not written: this VAE has no weights in PyTorch. Save the pipeline with its own "
            "VAE, or with pipe.vae = None, and set the bundle again after loading it"
        )

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> NoReturn:
        """Refused with `ConfigError`: a bundle is opened with `open_vae`."""
        raise ConfigError("a bundle is loaded with as_diffusers_vae(open_vae(path)), not with from_pretrained")


class _Interface(nn.Module):
    """No weights, but a parameter without elements: PyTorch's and diffusers' questions for type and device are answered
    by it, and conversions change it."""

    def __init__(self, marker: Tensor) -> None:
        super().__init__()
        self.marker = nn.Parameter(marker, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Its part of the network is in the graphs."""
        return x


class _Graph(nn.Module):
    """A graph of the bundle in the place of diffusers' encoder or decoder, with the parts that pipelines ask for."""

    def __init__(self, interface: _Interface, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.interface = interface
        self._run = run

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)

    @property
    def conv_in(self) -> nn.Module:
        return self.interface

    @property
    def mid_block(self) -> Any:
        """Some pipelines ask what computes its attention: nothing that could stay in half precision."""
        return SimpleNamespace(attentions=[SimpleNamespace(processor=None)], to=self.interface.to)


def _of_runtime(name: str) -> property:
    def get(self: DiffusersVae) -> Any:
        return getattr(self.runtime, name)

    def put(self: DiffusersVae, value: Any) -> None:
        setattr(self.runtime, name, value)

    return property(get, put, doc=f"The runtime's `{name}`.")


# Plain attributes in diffusers, read and set by whoever tunes tiling.
for _name in ("use_tiling", "use_slicing", "tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor"):
    setattr(DiffusersVae, _name, _of_runtime(_name))


def _same_device(one: torch.device, other: torch.device) -> bool:
    """ "cuda" and "cpu" are the first of their kind."""
    return (one.type, one.index or 0) == (other.type, other.index or 0)


def _device_of(runtime: VaeRuntime) -> torch.device:
    """OpenVINO's "gpu" and "npu" take arrays in host memory: for PyTorch that is the CPU."""
    device = str(getattr(runtime, "device", "cpu"))
    return torch.device(device if device.startswith("cuda") else "cpu")
