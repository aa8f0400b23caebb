"""Use a bundle as the VAE of a diffusers pipeline.

    from vae_export.diffusers import as_diffusers_vae

    pipe.vae = as_diffusers_vae(open_vae("sdxl"))

The result behaves like diffusers' `AutoencoderKL` in a pipeline: it passes type checks, has the same config, returns
the same output classes, and draws the same latents from the same generator.

This module has the same name as the library. Imports are absolute, so `import diffusers` always imports the library.
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
    """Return an opened bundle as the `vae` of a diffusers pipeline.

    `device` is the device of the pipeline's tensors; the default is the device of the runtime: its GPU, or the CPU. Set
    it to decode on the CPU the latents of a pipeline on a GPU; tensors are then copied through host memory.

    Raises `ConfigError` for a bundle without a known scaling factor, of another family than AutoencoderKL, or on pixels
    (`--io uint8`).
    """
    return DiffusersVae(runtime, device=device)


class _EqualToAutoencoderKL(type(AutoencoderKL)):  # type: ignore[misc]  # diffusers is not typed
    """The metaclass of `DiffusersVae`, which makes the class equal to diffusers' `AutoencoderKL`.

    `from_pipe` keeps a component only if `type(component) in (AutoencoderKL,)`, which is false for a subclass. The hash
    is not shared, so dictionaries and sets of classes still distinguish the two.
    """

    def __eq__(cls, other: object) -> bool:
        return cls is other or other is AutoencoderKL

    def __hash__(cls) -> int:
        return type.__hash__(cls)


class DiffusersVae(AutoencoderKL, metaclass=_EqualToAutoencoderKL):  # type: ignore[misc]
    """An `AutoencoderKL` of diffusers that encodes and decodes with an opened bundle, `runtime`.

    Tensors may have any float dtype and device. Results have the same dtype and device, and are computed in the
    precision of the bundle on the device of the runtime. If the devices are the same, nothing is copied. Gradients do
    not flow; a tensor that requires them causes a warning.

    `dtype` and `device` only describe the tensors of the pipeline: `to(torch.float16)` changes `dtype`, not the
    precision, which is fixed in the bundle. Moving between its device and the CPU, as offloading does, only changes
    `device`. Moving to another device raises `ConfigError`.

    Copying or unpickling this object, or a pipeline that contains it, opens the bundle again: see `VaeRuntime`.

    Tiling and slicing, with `tile_latent_min_size` and the other attributes, are those of the runtime.

    There are no weights in PyTorch, so `save_pretrained` raises `ConfigError`. Whoever opened the runtime closes it.
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
        super(AutoencoderKL, self).__init__()  # not that of AutoencoderKL, which builds a network
        fields = {name: value for name, value in runtime.config.to_dict().items() if not name.startswith("_")}
        self.register_to_config(**fields)
        self.runtime = runtime
        dtype = getattr(torch, runtime.spec["decoder"].output.dtype)
        self.interface = _Interface(torch.empty(0, dtype=dtype, device=device or _device_of(runtime)))
        self._home = self.interface.marker.device
        self.eval()

    # Encoding and decoding ------------------------------------------------------------------------------------------

    @apply_forward_hook  # type: ignore[untyped-decorator]  # the hook of accelerate, which offloads the previous model
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Encode images, float [B, in_channels, H, W] in [-1, 1], to the posterior over latents [B, C, H/f, W/f].

        Raises `ShapeError` if H or W is not a multiple of f.
        """
        posterior = DiagonalGaussianDistribution(self._moments(x))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode raw latents, float [B, latent_channels, h, w], to images [B, out_channels, f*h, f*w], not clipped.

        `generator` is ignored, because decoding is deterministic.
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
        """Convert the interface parameter with `fn`. `to`, `half`, `cuda` and similar methods call this.

        Raises `ConfigError` for a device or dtype that this VAE cannot have.
        """
        marker = self.interface.marker
        runs = f"this VAE runs in {self.runtime.backend} on {getattr(self.runtime, 'device', 'cpu')}"
        elsewhere = (
            f"{runs}, and the pipeline's tensors are on {marker.device}: neither can be moved. Open the bundle with "
            "open_vae(..., device=...), or give the device of the tensors with as_diffusers_vae(..., device=...)"
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

    # Parts that pipelines access ------------------------------------------------------------------------------------

    @property
    def encoder(self) -> nn.Module:
        """The whole encoder graph: images -> moments. `quant_conv`, which pipelines call after it, is an identity."""
        return _Graph(self.interface, self._moments)

    @property
    def decoder(self) -> nn.Module:
        """The whole decoder graph: raw latents -> images. `post_quant_conv`, called before it, is an identity."""
        return _Graph(self.interface, self._sample)

    @property
    def quant_conv(self) -> nn.Module | None:
        """An identity, or None if the model has no `quant_conv`."""
        return self.interface if self.config.use_quant_conv else None

    @property
    def post_quant_conv(self) -> nn.Module | None:
        """An identity, or None if the model has no `post_quant_conv`. Pipelines that upcast read its dtype."""
        return self.interface if self.config.use_post_quant_conv else None

    # Tiling and slicing ---------------------------------------------------------------------------------------------

    def enable_tiling(self, use_tiling: bool = True, tiling: str = "blended") -> None:
        """Enable tiling, or disable it if `use_tiling` is false. `tiling` is that of the runtime's `enable_tiling`."""
        if use_tiling:
            self.runtime.enable_tiling(tiling)
        else:
            self.runtime.disable_tiling()

    def disable_tiling(self) -> None:
        """Disable tiling."""
        self.runtime.disable_tiling()

    def enable_slicing(self) -> None:
        """Enable slicing: encode and decode one image at a time."""
        self.runtime.enable_slicing()

    def disable_slicing(self) -> None:
        """Disable slicing."""
        self.runtime.disable_slicing()

    def tiled_encode(self, x: Tensor, return_dict: bool = True) -> NoReturn:
        """Raise `ConfigError`: use `enable_tiling` and `encode`."""
        raise ConfigError("tiled_encode is a part of diffusers' own VAE: enable_tiling() and encode do it here")

    def tiled_decode(self, z: Tensor, return_dict: bool = True) -> NoReturn:
        """Raise `ConfigError`: use `enable_tiling` and `decode`."""
        raise ConfigError("tiled_decode is a part of diffusers' own VAE: enable_tiling() and decode do it here")

    # Files ----------------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> NoReturn:
        """Raise `ConfigError`: there are no weights in PyTorch to save."""
        raise ConfigError(
            f"{save_directory} was not written: this VAE has no weights in PyTorch. Save the pipeline with its own "
            "VAE, or with pipe.vae = None, and set the bundle again after loading it"
        )

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> NoReturn:
        """Raise `ConfigError`: bundles are opened with `open_vae`."""
        raise ConfigError("a bundle is loaded with as_diffusers_vae(open_vae(path)), not with from_pretrained")


class _Interface(nn.Module):
    """A module with one empty parameter, from which PyTorch and diffusers read dtype and device.

    Conversions such as `to` change the parameter.
    """

    def __init__(self, marker: Tensor) -> None:
        super().__init__()
        self.marker = nn.Parameter(marker, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x unchanged: the graphs contain the layer for which this module stands."""
        return x


class _Graph(nn.Module):
    """A graph of the bundle as diffusers' encoder or decoder, with the submodules that pipelines access."""

    def __init__(self, interface: _Interface, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.interface = interface
        self._run = run

    def forward(self, x: Tensor) -> Tensor:
        """Run the graph."""
        return self._run(x)

    @property
    def conv_in(self) -> nn.Module:
        """An identity, from which pipelines read dtype and device."""
        return self.interface

    @property
    def mid_block(self) -> Any:
        """A stub for pipelines that check for an attention processor that can stay in half precision: there is none."""
        return SimpleNamespace(attentions=[SimpleNamespace(processor=None)], to=self.interface.to)


def _of_runtime(name: str) -> property:
    def get(self: DiffusersVae) -> Any:
        return getattr(self.runtime, name)

    def put(self: DiffusersVae, value: Any) -> None:
        setattr(self.runtime, name, value)

    return property(get, put, doc=f"The runtime's `{name}`.")


# Plain attributes in diffusers, which users read and set to tune tiling.
for _name in ("use_tiling", "use_slicing", "tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor"):
    setattr(DiffusersVae, _name, _of_runtime(_name))


def _same_device(one: torch.device, other: torch.device) -> bool:
    """Return whether two devices are the same; a device without index is the first of its type."""
    return (one.type, one.index or 0) == (other.type, other.index or 0)


def _device_of(runtime: VaeRuntime) -> torch.device:
    """Return the PyTorch device of a runtime. OpenVINO's "gpu" and "npu" use host memory: for PyTorch, the CPU."""
    device = str(getattr(runtime, "device", "cpu"))
    return torch.device(device if device.startswith("cuda") else "cpu")
