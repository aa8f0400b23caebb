"""`FlaxAutoencoderKL`: the VAE in JAX, compatible with the class that diffusers had until 0.39, with more features.

    vae, params = FlaxAutoencoderKL.from_pretrained("sdxl-vae")
    posterior = vae.apply({"params": params}, images, method=vae.encode).latent_dist
    images = vae.apply({"params": params}, latents, method=vae.decode).sample

The model is a pure function of its parameters, so it works under jit, vmap, grad, shard_map and sharded over a mesh.
Internally it is channels-last (NHWC). Images and latents at its interface are [B, C, H, W]. The posterior is
[B, h, w, C], as in diffusers, and `decode(..., layout="NHWC")` accepts its samples directly.

Parameters have the names and shapes of diffusers 0.39: each library loads the msgpack files of the other.
"""

from __future__ import annotations

from runtimes.flax import params as flax_params  # first: its error names the package to install if JAX is missing

# isort: split
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn
from flax import struct
from jax import Array
from jax import numpy as jnp

from runtimes.bundle import Bundle
from runtimes.config import VaeConfig
from runtimes.errors import BundleError, CompatibilityError, ConfigError, ShapeError
from runtimes.files import written_whole
from runtimes.flax.layers import Decoder, Encoder
from runtimes.flax.params import FLAX_FILE, TORCH_FILE, Params
from runtimes.manifest import MANIFEST_FILE
from runtimes.posterior import LOGVAR_RANGE

CONFIG_FILE = "config.json"
LAYOUTS = ("NCHW", "NHWC")


# Results of encode and decode -------------------------------------------------------------------------------------


@jax.tree_util.register_pytree_node_class
class FlaxDiagonalGaussianDistribution:
    """An independent Gaussian for each element of the latents, channels last.

    `parameters` [B, h, w, 2*C] holds the mean, then the logvar (clamped to [-30, 20]). With `deterministic` the
    variance is 0. `mean`, `logvar`, `std` and `var` are [B, h, w, C]. The class is a pytree, so transformed functions
    can take and return it.
    """

    def __init__(self, parameters: Array, deterministic: bool = False) -> None:
        self.parameters = parameters
        self.deterministic = deterministic

    @property
    def mean(self) -> Array:
        return self.parameters[..., : self.parameters.shape[-1] // 2]

    @property
    def logvar(self) -> Array:
        return jnp.clip(self.parameters[..., self.parameters.shape[-1] // 2 :], *LOGVAR_RANGE)

    @property
    def std(self) -> Array:
        return jnp.zeros_like(self.mean) if self.deterministic else jnp.exp(0.5 * self.logvar)

    @property
    def var(self) -> Array:
        return jnp.zeros_like(self.mean) if self.deterministic else jnp.exp(self.logvar)

    def sample(self, key: Array) -> Array:
        """Draw latents [B, h, w, C] in the parameters' dtype, with a key of `jax.random`."""
        return self.mean + self.std * jax.random.normal(key, self.mean.shape, self.mean.dtype)

    def mode(self) -> Array:
        """Return the most likely latents [B, h, w, C]: the mean."""
        return self.mean

    def kl(self, other: FlaxDiagonalGaussianDistribution | None = None) -> Array:
        """Return the Kullback-Leibler divergence [B] from `other`, or from the standard normal distribution."""
        if self.deterministic:
            return jnp.zeros(1)
        if other is None:
            terms = self.mean**2 + self.var - 1.0 - self.logvar
        else:
            terms = (self.mean - other.mean) ** 2 / other.var + self.var / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * terms.sum((1, 2, 3))

    def nll(self, sample: Array, axis: Sequence[int] = (1, 2, 3)) -> Array:
        """Return the negative log-likelihood of `sample` [B, h, w, C], summed over `axis`."""
        if self.deterministic:
            return jnp.zeros(1)
        terms = math.log(2.0 * math.pi) + self.logvar + (sample - self.mean) ** 2 / self.var
        return 0.5 * terms.sum(tuple(axis))

    def tree_flatten(self) -> tuple[tuple[Array], bool]:
        return (self.parameters,), self.deterministic

    @classmethod
    def tree_unflatten(cls, deterministic: bool, children: tuple[Array]) -> FlaxDiagonalGaussianDistribution:
        return cls(children[0], deterministic)


@struct.dataclass
class FlaxAutoencoderKLOutput:
    """Result of encode: `latent_dist` is the posterior over latents [B, h, w, C]."""

    latent_dist: FlaxDiagonalGaussianDistribution

    def __getitem__(self, key: int | str) -> Any:
        return {0: self.latent_dist, "latent_dist": self.latent_dist}[key]


@struct.dataclass
class FlaxDecoderOutput:
    """Result of decode: `sample` holds images [B, out_channels, f*h, f*w], nominally in [-1, 1] and not clipped."""

    sample: Array

    def __getitem__(self, key: int | str) -> Any:
        return {0: self.sample, "sample": self.sample}[key]


# The model --------------------------------------------------------------------------------------------------------


class FlaxKLBase(nn.Module):
    """The network of AutoencoderKL and of its relatives, as a subclass's `config`, `dtype` and `precision` say."""

    def setup(self) -> None:
        config, settings = self.config, (self.config, self.dtype, self.precision)
        point = functools.partial(nn.Conv, kernel_size=(1, 1), dtype=self.dtype, precision=self.precision)
        self.encoder, self.decoder = Encoder(*settings), Decoder(*settings)
        self.quant_conv = point(2 * config.latent_channels) if config.use_quant_conv else None
        self.post_quant_conv = point(config.latent_channels) if config.use_post_quant_conv else None

    def init_weights(self, rng: Array) -> Params:
        """Return random parameters in fp32, as a tree of dictionaries."""
        side = self.config.downscale
        # Under jit only the random numbers are computed: XLA removes the forward pass, whose result is unused.
        init = jax.jit(lambda rng: self.init(rng, jnp.zeros((1, self.config.in_channels, side, side)))["params"])
        params: Params = init(rng)
        return params

    def encode(
        self, sample: Array, deterministic: bool = True, return_dict: bool = True
    ) -> FlaxAutoencoderKLOutput | tuple[FlaxDiagonalGaussianDistribution]:
        """Encode images, float [B, in_channels, H, W] in [-1, 1], to the posterior over latents [B, H//f, W//f, C].

        `deterministic` is accepted for compatibility with diffusers and ignored: there is no dropout. Raises
        `ShapeError` for a wrong shape or dtype.
        """
        _check("images", sample, "NCHW", self.config.in_channels)
        moments = self.encoder(sample.transpose(0, 2, 3, 1))
        moments = moments if self.quant_conv is None else self.quant_conv(moments)
        posterior = FlaxDiagonalGaussianDistribution(moments)
        return FlaxAutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(
        self, latents: Array, deterministic: bool = True, return_dict: bool = True, layout: str = "NCHW"
    ) -> FlaxDecoderOutput | tuple[Array]:
        """Decode raw float latents to images [B, out_channels, f*h, f*w], not clipped.

        `layout` is the layout of the latents: "NCHW" [B, C, h, w], or "NHWC" [B, h, w, C], which the posterior returns.
        It is never guessed: diffusers mistook a width of C for channels. Raises `ShapeError` for wrong shapes.
        """
        _check("latents", latents, layout, self.config.latent_channels)
        z = latents.transpose(0, 2, 3, 1) if layout == "NCHW" else latents
        z = z if self.post_quant_conv is None else self.post_quant_conv(z)
        sample = self.decoder(z).transpose(0, 3, 1, 2)
        return FlaxDecoderOutput(sample=sample) if return_dict else (sample,)

    def __call__(
        self, sample: Array, sample_posterior: bool = False, deterministic: bool = True, return_dict: bool = True
    ) -> FlaxDecoderOutput | tuple[Array]:
        """Encode images and decode the posterior's mode, or a sample of it with `sample_posterior`.

        The key for sampling is passed to `apply` as `rngs={"gaussian": key}`.
        """
        posterior = self.encode(sample)[0]
        z = posterior.sample(self.make_rng("gaussian")) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict, layout="NHWC")

    def shapes(self) -> Params:
        """Return the tree of the parameters' shapes and dtypes, without computing values."""
        shapes: Params = jax.eval_shape(self.init_weights, jax.random.key(0))
        return shapes


class FlaxKLNetwork(FlaxKLBase):
    """The network of a config of AutoencoderKL or of a relative: what bundles are written from."""

    config: Any
    dtype: Any = jnp.float32
    precision: Any = None


class FlaxAutoencoderKL(FlaxKLBase):
    """The VAE: encodes images in [-1, 1] to a posterior over latents, and decodes latents to images.

    The fields are those of `VaeConfig`; `config` returns them checked. `dtype` is the type of all activations:
    bfloat16, float16 or float32; norm statistics are always fp32. Parameters may have any of these types;
    `init_weights` returns fp32. `precision` is JAX's precision of all products: on TPUs and GPUs, fp32 products are
    computed in fp32 only with "highest".

    Latents are raw. To exchange them with a diffusion model, use `scale_latents` and `unscale_latents`.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: Sequence[str] = ("DownEncoderBlock2D",)
    up_block_types: Sequence[str] = ("UpDecoderBlock2D",)
    block_out_channels: Sequence[int] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float | None = 0.18215
    shift_factor: float | None = None
    latents_mean: Sequence[float] | None = None
    latents_std: Sequence[float] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    dtype: Any = jnp.float32
    precision: Any = None

    @property
    def config(self) -> VaeConfig:
        """The checked config; raises `ConfigError` at first use for a value that no `AutoencoderKL` can have."""
        return VaeConfig(**{name: getattr(self, name) for name in VaeConfig.__dataclass_fields__})

    @classmethod
    def from_config(cls, config: VaeConfig | Any, **options: Any) -> FlaxAutoencoderKL:
        """Create the model from a `VaeConfig` or a diffusers config dictionary; `options` are dtype and precision."""
        config = config if isinstance(config, VaeConfig) else VaeConfig.from_dict(config)
        return cls(**{name: getattr(config, name) for name in VaeConfig.__dataclass_fields__}, **options)

    @nn.nowrap
    def scale_latents(self, latents: Array, layout: str = "NCHW") -> Array:
        """Convert raw latents to normalised latents for a diffusion model, by the config's shift and scale."""
        multiply, add = self._affine(layout)
        return (latents - add) * multiply

    @nn.nowrap
    def unscale_latents(self, latents: Array, layout: str = "NCHW") -> Array:
        """Convert normalised latents to raw latents, which `decode` takes: the inverse of `scale_latents`."""
        multiply, add = self._affine(layout)
        return latents / multiply + add

    @nn.nowrap
    def _affine(self, layout: str) -> tuple[Array, Array]:
        space = self.config.latent_space
        if not space.is_known:
            raise ConfigError("the config does not say its scaling_factor; give FlaxAutoencoderKL a scaling_factor")
        shape = (-1, 1, 1) if _known(layout) == "NCHW" else (-1,)
        multiply, add = (jnp.asarray(values, jnp.float32).reshape(shape) for values in (space.multiply, space.add))
        return multiply, add

    # Loading and saving -------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        subfolder: str | None = None,
        from_pt: bool = False,
        dtype: Any = jnp.float32,
        precision: Any = None,
    ) -> tuple[FlaxAutoencoderKL, Params]:
        """Load (model, parameters) from a directory: a `flax` bundle, or config.json and weights of diffusers.

        Weights are read from diffusion_flax_model.msgpack, or from diffusion_pytorch_model.safetensors if the former
        does not exist or `from_pt` is set. They keep their stored dtype; `dtype` is that of the activations. Raises
        `ConfigError` if the directory is not the complete checkpoint of an `AutoencoderKL`, and the errors of `Bundle`.
        """
        directory = Path(path) / (subfolder or "")
        if not directory.is_dir():
            raise ConfigError(
                f"{directory} is not a directory; `hf download REPOSITORY --local-dir DIRECTORY` makes one"
            )
        if (directory / MANIFEST_FILE).exists():
            bundle = Bundle(directory)
            if bundle.manifest.target != "flax":
                raise CompatibilityError(f"{directory} is a bundle for {bundle.manifest.target}, and has no parameters")
            if bundle.manifest.family != "AutoencoderKL":
                raise ConfigError(f"{directory} is of an {bundle.manifest.family}: open_vae opens it")
            config, name, data = bundle.manifest.config, FLAX_FILE, bundle.read(FLAX_FILE)
        else:
            config = VaeConfig.from_json(directory / CONFIG_FILE)
            name = FLAX_FILE if (directory / FLAX_FILE).exists() and not from_pt else TORCH_FILE
            data = _read(directory / name)
        read = flax_params.read_msgpack if name == FLAX_FILE else flax_params.read_safetensors
        params, model = read(data, str(directory / name)), cls.from_config(config, dtype=dtype, precision=precision)
        flax_params.check_params(params, model.shapes(), str(directory / name))
        return model, jax.tree.map(jnp.asarray, params)

    def save_pretrained(self, directory: str | Path, params: Params, safe_serialization: bool = False) -> None:
        """Write config.json and diffusion_flax_model.msgpack for diffusers, each file atomically.

        With `safe_serialization`, write diffusion_pytorch_model.safetensors for PyTorch instead of the msgpack file.
        """
        flax_params.check_params(params, self.shapes(), "params")
        params = jax.device_get(params)
        if safe_serialization:
            safetensors = flax_params.import_safetensors()
            name, data = TORCH_FILE, safetensors.numpy.save(flax_params.to_torch(params), metadata={"format": "pt"})
        else:
            name, data = FLAX_FILE, flax_params.write_msgpack(params)
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BundleError(f"cannot write to {directory}: {error.strerror}") from None
        for file, content in ((name, data), (CONFIG_FILE, self.config.to_json().encode())):
            with written_whole(Path(directory) / file) as partial:
                partial.write_bytes(content)


def _check(what: str, x: Array, layout: str, channels: int) -> None:
    shape = ["B", "height", "width"]
    axis = _known(layout).index("C")
    shape.insert(axis, str(channels))
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ShapeError(f"{what} are floating point, not {x.dtype}")
    if x.ndim != 4 or x.shape[axis] != channels or 0 in x.shape:
        hint = "; draws of the posterior are decoded with layout='NHWC'" if what == "latents" and axis == 1 else ""
        raise ShapeError(f"{what} ({layout}) are [{', '.join(shape)}], not {list(x.shape)}{hint}")


def _known(layout: str) -> str:
    if layout not in LAYOUTS:
        raise ShapeError(f"layout {layout!r} is not known; known are {' and '.join(LAYOUTS)}")
    return layout


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist, nor is there {FLAX_FILE} beside it") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
