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
from runtimes.errors import ConfigError, NotInstalled

try:
    from diffusers import AutoencoderKL
    from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput
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


class DiffusersVae(AutoencoderKL):  # type: ignore[misc]  # diffusers is not typed
    """An `AutoencoderKL` of diffusers whose encoder and decoder are those of an opened bundle, `runtime`.

    Tensors may be of any float type and on any device; results are of the same, computed in the bundle's precision on
    the runtime's device. Where that is the tensors' device, nothing is copied. No gradients flow.

    `dtype` and `device` are what pipelines give to it, and nothing else follows from them: `to(torch.float16)` changes
    `dtype`, not the precision, which is fixed in the bundle; moving it to another device is refused (`ConfigError`).

    Tiling and slicing are the runtime's, with all of its options; so are `tile_latent_min_size` and its kin.

    It has no weights in PyTorch: `save_pretrained` is refused, and closing the runtime is up to whoever opened it.
    """

    def __init__(self, runtime: VaeRuntime, *, device: str | torch.device | None = None) -> None:
        if not isinstance(runtime, VaeRuntime):
            raise ConfigError(f"as_diffusers_vae takes what open_vae returns, not {type(runtime).__name__}")
        tensors = [tensor for graph in runtime.spec.values() for tensor in (graph.input, graph.output)]
        if any(tensor.dtype == "uint8" for tensor in tensors):
            raise ConfigError("pipelines give and take floats, and this bundle takes pixels; export without --io uint8")
        if runtime.config.scaling_factor is None:
            raise ConfigError("the bundle does not say its scaling_factor, which pipelines need; export it with one")
        super(AutoencoderKL, self).__init__()  # not its own, which makes a network
        fields = {name: value for name, value in runtime.config.to_dict().items() if not name.startswith("_")}
        self.register_to_config(**fields)
        self.runtime = runtime
        dtype = getattr(torch, runtime.spec["decoder"].output.dtype)
        self.interface = _Interface(torch.empty(0, dtype=dtype, device=device or _device_of(runtime)))
        self.eval()

    # Encoding and decoding ------------------------------------------------------------------------------------------

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Images, float [B, in_channels, H, W] in [-1, 1] -> diffusers' posterior over latents [B, C, H/f, W/f].

        Raises `ShapeError` where H or W is not a multiple of f.
        """
        moments = self.runtime.encode(x)[0].parameters
        posterior = DiagonalGaussianDistribution(moments.to(x.dtype))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Raw latents, float [B, latent_channels, h, w] -> images [B, out_channels, f*h, f*w], not clipped.

        `generator` is not used: decoding is deterministic.
        """
        sample = self.runtime.decode(z)[0].to(z.dtype)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    # Where tensors are, and of what type ----------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DiffusersVae:
        """What `to`, `half`, `cuda` and the like come down to; `fn` converts a parameter."""
        marker = self.interface.marker
        runs = f"this VAE runs in {self.runtime.backend} on {getattr(self.runtime, 'device', 'cpu')}"
        elsewhere = (
            f"{runs}, and the pipeline's tensors are on {marker.device}: neither can be moved. Open the bundle with "
            "open_vae(..., device=...), or say where the tensors are with as_diffusers_vae(..., device=...); with "
            "offloading of models, set pipe.vae after it was enabled"
        )
        try:
            moved = fn(marker)
        except (RuntimeError, AssertionError) as error:  # PyTorch without that device
            raise ConfigError(f"{elsewhere} ({error})") from None
        if moved.device != marker.device:
            raise ConfigError(elsewhere)
        if moved.dtype not in INTERFACE_DTYPES:
            raise ConfigError(f"{runs} in {self.runtime.precision}: it takes and gives no {moved.dtype}")
        super()._apply(fn, recurse)
        return self

    @property
    def post_quant_conv(self) -> nn.Module | None:
        """Pipelines that upcast look for the type of its parameters."""
        return self.interface if self.config.use_post_quant_conv else None

    @property
    def decoder(self) -> Any:
        """Some pipelines ask what computes its attention: nothing that could stay in half precision."""
        return SimpleNamespace(mid_block=SimpleNamespace(attentions=[SimpleNamespace(processor=None)]))

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


def _of_runtime(name: str) -> property:
    def get(self: DiffusersVae) -> Any:
        return getattr(self.runtime, name)

    def put(self: DiffusersVae, value: Any) -> None:
        setattr(self.runtime, name, value)

    return property(get, put, doc=f"The runtime's `{name}`.")


# Plain attributes in diffusers, read and set by whoever tunes tiling.
for _name in ("use_tiling", "use_slicing", "tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor"):
    setattr(DiffusersVae, _name, _of_runtime(_name))


def _device_of(runtime: VaeRuntime) -> torch.device:
    """OpenVINO's "gpu" and "npu" take arrays in host memory: for PyTorch that is the CPU."""
    device = str(getattr(runtime, "device", "cpu"))
    return torch.device(device if device.startswith("cuda") else "cpu")
