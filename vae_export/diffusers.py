"""Use a bundle as the VAE of a diffusers pipeline.

    from vae_export.diffusers import as_diffusers_vae

    pipe.vae = as_diffusers_vae(open_vae("sdxl"))

The result behaves in a pipeline like diffusers' class of the model's family (`AutoencoderKL`, `AutoencoderKLFlux2`,
`AutoencoderTiny` or `AsymmetricAutoencoderKL`): it passes type checks, has the same config, returns the same output
classes, and draws the same latents from the same generator.

This module has the same name as the library. Imports are absolute, so `import diffusers` always imports the library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar, NoReturn, cast

import torch
from torch import Tensor, nn

from runtimes import VaeRuntime
from runtimes.errors import ConfigError, NotInstalled

try:
    from diffusers import AsymmetricAutoencoderKL, AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
    from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput
    from diffusers.utils.accelerate_utils import apply_forward_hook
except ImportError:
    raise NotInstalled("diffusers is not installed: pip install 'vae-export[diffusers]'") from None

__all__ = ["BundleVae", "DiffusersVae", "as_diffusers_vae"]

INTERFACE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def as_diffusers_vae(runtime: VaeRuntime, *, device: str | torch.device | None = None) -> Any:
    """Return an opened bundle as the `vae` of a diffusers pipeline.

    `device` is the device of the pipeline's tensors; the default is the device of the runtime: its GPU, or the CPU. Set
    it to decode on the CPU the latents of a pipeline on a GPU; tensors are then copied through host memory.

    Raises `ConfigError` for a bundle without a known scaling factor, of a family that diffusers does not have, or on
    pixels (`--io uint8`).
    """
    if not isinstance(runtime, VaeRuntime):
        raise ConfigError(f"as_diffusers_vae takes what open_vae returns, not {type(runtime).__name__}")
    family = runtime.manifest.family
    if family not in CLASSES:
        raise ConfigError(f"diffusers has no {family}; it has {', '.join(CLASSES)}")
    return CLASSES[family](runtime, device=device)


class _EqualToItsBase(type(AutoencoderKL)):  # type: ignore[misc]  # diffusers is not typed
    """The metaclass of the classes below, which makes each equal to the class of diffusers that it stands for.

    `from_pipe` keeps a component only if `type(component) in (AutoencoderKL,)`, which is false for a subclass. The hash
    is not shared, so dictionaries and sets of classes still distinguish the two.
    """

    def __eq__(cls, other: object) -> bool:
        return cls is other or (other is not None and other is getattr(cls, "stands_for", None))

    def __hash__(cls) -> int:
        return type.__hash__(cls)


class BundleVae(nn.Module):
    """The part that all classes below share: a VAE of diffusers that encodes and decodes with an opened bundle.

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

    stands_for: ClassVar[type]  #: the class of diffusers
    config: Any  #: diffusers' frozen dictionary
    runtime: VaeRuntime  #: the opened bundle

    def __init__(self, runtime: VaeRuntime, *, device: str | torch.device | None = None) -> None:
        tensors = [tensor for graph in runtime.spec.values() for tensor in (graph.input, graph.output)]
        if any(tensor.dtype == "uint8" for tensor in tensors):
            raise ConfigError("pipelines give and take floats, and this bundle takes pixels; export without --io uint8")
        if not isinstance(runtime, VaeRuntime):
            raise ConfigError(f"as_diffusers_vae takes what open_vae returns, not {type(runtime).__name__}")
        if runtime.manifest.family != self.stands_for.__name__:
            raise ConfigError(f"this bundle is of an {runtime.manifest.family}, not of an {self.stands_for.__name__}")
        if not runtime.latent_space.is_known:
            raise ConfigError("the bundle does not say its scaling_factor, which pipelines need; export it with one")
        super(cast(Any, self.stands_for), self).__init__()  # not that of the class itself, which builds a network
        fields = {name: value for name, value in runtime.config.to_dict().items() if not name.startswith("_")}
        cast(Any, self).register_to_config(**fields, **self._more_fields(fields))
        self.runtime = runtime
        dtype = getattr(torch, runtime.spec["decoder"].output.dtype)
        self.interface = _Interface(torch.empty(0, dtype=dtype, device=device or _device_of(runtime)))
        self._home = self.interface.marker.device
        self.eval()

    # Encoding and decoding ------------------------------------------------------------------------------------------

    @staticmethod
    def _more_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
        """Fields that diffusers' class adds to those of its config.json."""
        return {}

    @apply_forward_hook  # type: ignore[untyped-decorator]  # the hook of accelerate, which offloads the previous model
    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Encode images, float [B, in_channels, H, W] in [-1, 1], to the posterior over latents [B, C, H/f, W/f].

        That is an `AutoencoderKLOutput` with `latent_dist`. An encoder that gives plain latents, as AutoencoderTiny's
        does, is answered by an `AutoencoderTinyOutput` with `latents`. Raises `ShapeError` if H or W is not a multiple
        of f.
        """
        encoded = self._encoded(x)
        if not self.runtime.graph_space.posterior:
            return AutoencoderTinyOutput(latents=encoded) if return_dict else (encoded,)
        posterior = DiagonalGaussianDistribution(encoded)
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

    def _encoded(self, x: Tensor) -> Tensor:
        encoded = self.runtime.encode(x)[0]
        moments: Tensor = encoded.parameters if self.runtime.graph_space.posterior else encoded
        return moments.to(x.dtype)

    def _sample(self, z: Tensor) -> Tensor:
        sample: Tensor = self.runtime.decode(z)[0]
        return sample.to(z.dtype)

    # Where tensors are, and of what type ----------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
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
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    # Parts that pipelines access ------------------------------------------------------------------------------------

    @property
    def encoder(self) -> nn.Module:
        """The whole encoder graph: images -> moments. `quant_conv`, which pipelines call after it, is an identity."""
        return _Graph(self.interface, self._encoded)

    @property
    def decoder(self) -> nn.Module:
        """The whole decoder graph: raw latents -> images. `post_quant_conv`, called before it, is an identity."""
        return _Graph(self.interface, self._sample)

    @property
    def quant_conv(self) -> nn.Module | None:
        """An identity, or None if the model has no `quant_conv`."""
        return self.interface if self.config.get("use_quant_conv", True) else None

    @property
    def post_quant_conv(self) -> nn.Module | None:
        """An identity, or None if the model has no `post_quant_conv`. Pipelines that upcast read its dtype."""
        return self.interface if self.config.get("use_post_quant_conv", True) else None

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


class DiffusersVae(BundleVae, AutoencoderKL, metaclass=_EqualToItsBase):  # type: ignore[misc]
    """An `AutoencoderKL` of diffusers on an opened bundle: see `BundleVae`."""

    stands_for = AutoencoderKL


class DiffusersVaeFlux2(BundleVae, AutoencoderKLFlux2, metaclass=_EqualToItsBase):  # type: ignore[misc]
    """An `AutoencoderKLFlux2` of diffusers on an opened bundle: see `BundleVae`."""

    stands_for = AutoencoderKLFlux2

    @property
    def bn(self) -> SimpleNamespace:
        """Mean and variance of normalised latents, float32 [C * 4] each, from which pipelines normalise themselves."""
        space = self.runtime.latent_space
        variance = 1 / torch.tensor(space.multiply, dtype=torch.float64) ** 2 - self.config.batch_norm_eps
        device = self.interface.marker.device
        return SimpleNamespace(
            running_mean=torch.tensor(space.add, dtype=torch.float32, device=device),
            running_var=variance.to(device=device, dtype=torch.float32),
        )


class DiffusersVaeTiny(BundleVae, AutoencoderTiny, metaclass=_EqualToItsBase):  # type: ignore[misc]
    """An `AutoencoderTiny` of diffusers on an opened bundle: see `BundleVae`."""

    stands_for = AutoencoderTiny

    @staticmethod
    def _more_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
        return {"block_out_channels": fields["decoder_block_out_channels"]}


class DiffusersVaeAsymmetric(BundleVae, AsymmetricAutoencoderKL, metaclass=_EqualToItsBase):  # type: ignore[misc]
    """An `AsymmetricAutoencoderKL` of diffusers on an opened bundle: see `BundleVae`."""

    stands_for = AsymmetricAutoencoderKL

    @staticmethod
    def _more_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
        return {"block_out_channels": fields["up_block_out_channels"], "force_upcast": False}

    def decode(
        self,
        z: Tensor,
        generator: torch.Generator | None = None,
        image: Tensor | None = None,
        mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Decode raw latents as `BundleVae.decode` does. Raises `ConfigError` for an image or a mask."""
        if image is not None or mask is not None:
            raise ConfigError("bundles decode without an image and a mask; put the masked part into the image yourself")
        return super().decode(z, return_dict)


#: family -> class that stands for diffusers' class of the same name
CLASSES: dict[str, Any] = {
    kind.stands_for.__name__: kind
    for kind in (DiffusersVae, DiffusersVaeFlux2, DiffusersVaeTiny, DiffusersVaeAsymmetric)
}


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
    def get(self: BundleVae) -> Any:
        return getattr(self.runtime, name)

    def put(self: BundleVae, value: Any) -> None:
        setattr(self.runtime, name, value)

    return property(get, put, doc=f"The runtime's `{name}`.")


# Plain attributes in diffusers, which users read and set to tune tiling.
for _name in ("use_tiling", "use_slicing", "tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor"):
    setattr(BundleVae, _name, _of_runtime(_name))


def _same_device(one: torch.device, other: torch.device) -> bool:
    """Return whether two devices are the same; a device without index is the first of its type."""
    return (one.type, one.index or 0) == (other.type, other.index or 0)


def _device_of(runtime: VaeRuntime) -> torch.device:
    """Return the PyTorch device of a runtime. OpenVINO's "gpu" and "npu" use host memory: for PyTorch, the CPU."""
    device = str(getattr(runtime, "device", "cpu"))
    return torch.device(device if device.startswith("cuda") else "cpu")
