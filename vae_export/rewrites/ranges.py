"""Measure the largest activations of a model, and simulate half precision.

Both run the model and observe the result of every operation. The simulation rounds each result to fp16 or bf16, like a
GPU that stores tensors in that type and accumulates in fp32. The CPU provider of ONNX Runtime is no substitute: it
computes fp16 graphs in fp32 between nodes, which hides overflow.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from runtimes.errors import NumericsError
from runtimes.progress import Progress, no_progress
from vae_export.families.base import ReferenceVae
from vae_export.photos import middle_of, photographs
from vae_export.rewrites.attention import PortableAttention, use_portable_attention
from vae_export.rewrites.operators import attend_in_turn

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
LATENT_SIZES = (
    (16, 24),
    (32, 32),
)  #: (height, width); two sizes, because norm statistics and thus activations depend on the size
SCORES = 2**24  #: maximum number of attention scores at a time in a watched model: 64 MiB, plus some copies


class Ranges(NamedTuple):
    """The largest absolute activation at every place, in the order of the computation.

    A place is the name of a leaf module, or the name of another module and an operation in it:
    `decoder.up_blocks.2.resnets.0.conv1`, `decoder.mid_block.attentions.0 bmm`.
    """

    largest: Mapping[str, float]

    def at(self, place: str) -> float:
        """Return the largest activation of a module, over its own place and its operations; 0 for an unknown place."""
        found = (v for name, v in self.largest.items() if name == place or name.startswith(place + " "))
        return max(found, default=0.0)


class WatchedAttention(PortableAttention):
    """Attention from operations that `Watch` observes, with at most about `SCORES` scores at a time.

    The custom operator of exported graphs would hide the scores, and so their overflow.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, positions, channels = q.shape
        return attend_in_turn(q * channels**-0.5, k, v, max(1, SCORES // (batch * positions)))


def watchable(model: ReferenceVae) -> ReferenceVae:
    """Return a copy of the model whose attention is `WatchedAttention`."""
    model = use_portable_attention(model)
    for module in model.modules():
        if isinstance(module, PortableAttention):
            module.__class__ = WatchedAttention
    return model


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record the largest absolute value of the result of each operation; round results to `dtype` if it is given."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest: dict[str, float] = {}
        self.first_not_finite: str | None = None
        self._dtype = dtype
        self._stack: list[str] = []
        self._leaves = {name for name, module in model.named_modules() if not any(module.children())}
        self._model = model

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Return a context in which operations are recorded under the name of the module that runs them."""
        handles = []
        for name, module in self._model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._stack.append(name)))
            handles.append(module.register_forward_hook(lambda *_: self._leave()))
        try:
            with torch.no_grad(), self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self) -> None:
        self._stack.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, tuple):  # native_group_norm: a GPU keeps its mean and deviation in fp32
            return (self._seen(result[0], func), *result[1:])
        return self._seen(result, func)

    def _seen(self, result: Any, func: Any) -> Any:
        if not isinstance(result, Tensor) or not result.is_floating_point() or func.is_view or not result.numel():
            return result
        if self._dtype is not None:
            result = result.to(self._dtype).to(result.dtype)
        module = self._stack[-1] if self._stack else ""
        place = module if module in self._leaves else f"{module} {func.overloadpacket.__name__}".strip()
        # Not abs().amax(), which would copy the largest tensors.
        largest = max(abs(end.item()) for end in torch.aminmax(result))
        if not math.isfinite(largest) and self.first_not_finite is None:
            self.first_not_finite = place
        self.largest[place] = max(largest, self.largest.get(place, 0.0))
        return result


def probe(model: ReferenceVae, inputs: Iterable[tuple[str, Tensor]]) -> Ranges:
    """Run inputs through the model in fp32 and return the largest activations.

    ("encoder", images) are encoded and their latents decoded; ("decoder", latents) are decoded. Raises `NumericsError`
    if the model overflows even in fp32, which no scale can prevent.
    """
    watched = watchable(model)
    watch = Watch(watched)
    for graph, x in inputs:
        with watch.watching():
            result = _run(watched, graph, x)
            if graph == "encoder":
                _run(watched, "decoder", result[:, : model.latent_space.channels])
        if watch.first_not_finite is not None:
            raise NumericsError(
                f"{watch.first_not_finite} gives NaN or infinity already in fp32: the weights are unusable"
            )
    return Ranges(watch.largest)


class SimulatedHalf:
    """A simulation of the model on a GPU in half precision: weights and the result of every operation are rounded.

    `run` returns the output in fp32; afterwards `first_not_finite` is the place of the first overflow, or None.
    """

    def __init__(self, model: ReferenceVae, precision: str) -> None:
        dtype = HALVES[precision]
        self._model = watchable(model)
        for parameter in self._model.parameters():
            parameter.data = parameter.data.to(dtype).to(torch.float32)
        self._watch = Watch(self._model, dtype)

    @property
    def first_not_finite(self) -> str | None:
        return self._watch.first_not_finite

    @property
    def ranges(self) -> Ranges:
        return Ranges(self._watch.largest)

    def run(self, graph: str, x: Tensor) -> Tensor:
        with self._watch.watching():
            return _run(self._model, graph, x.to(self._watch._dtype).to(torch.float32))


def calibration_inputs(
    model: ReferenceVae, directory: str | Path | None = None, progress: Progress = no_progress
) -> Iterator[tuple[str, Tensor]]:
    """Yield the inputs of `probe`, one at a time: photographs and noise latents, at more than one size.

    `directory` holds the user's photographs, at any depth; the default is the embedded photographs.
    """
    config, factor = model.config, model.latent_space.factor
    photos = photographs(directory)
    total = len(photos) + len(LATENT_SIZES)
    for done, (path, (height, width)) in enumerate(zip(photos, itertools.cycle(LATENT_SIZES))):
        progress(f"Measuring activations on {path.name}", done, total)
        yield "encoder", middle_of(path, height * factor, width * factor, config.in_channels)
    # Diffusion models produce latents of unit variance, which are unscaled before decoding.
    space = model.latent_space
    generator = torch.Generator().manual_seed(0)
    for done, (height, width) in enumerate(LATENT_SIZES, start=len(photos)):
        progress("Measuring activations on noise", done, total)
        channels, patch = (space.normalised_channels, space.patch) if space.is_known else (space.channels, 1)
        noise = torch.randn(1, channels, height // patch, width // patch, generator=generator)
        yield "decoder", space.denormalise(noise) if space.is_known else noise
    progress("Measured", total, total)


def _run(model: ReferenceVae, graph: str, x: Tensor) -> Tensor:
    return model.encode_moments(x) if graph == "encoder" else model.decode_latents(x)
