"""How large activations get, and what half precision makes of them.

Both questions are answered by running the model and watching every single operation. The simulated half rounds the
result of each to fp16 (or bf16), as a GPU does that keeps its tensors in that type and accumulates in fp32. ONNX
Runtime's CPU provider cannot serve for this: it computes fp16 graphs in fp32 between nodes, and hides overflow.
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
from runtimes.progress import Progress
from vae_export.model import AutoencoderKL
from vae_export.photos import middle_of, photographs
from vae_export.rewrite import use_portable_attention

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
LATENT_SIZES = ((16, 24), (32, 32))  #: statistics of the norms, and so activations, depend on the size


class Ranges(NamedTuple):
    """The largest absolute activation at every place, in the order of the computation.

    A place is a module's name, with the operation behind it where the module has several:
    `decoder.up_blocks.2.resnets.0.conv1`, `decoder.mid_block.attentions.0 bmm`.
    """

    largest: Mapping[str, float]

    def at(self, place: str) -> float:
        """The largest activation that a module gives out: its own place, or any of its own operations."""
        found = (v for name, v in self.largest.items() if name == place or name.startswith(place + " "))
        return max(found, default=0.0)


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record the largest absolute value that each operation gives, and, with `dtype`, round it to that type."""

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
        """Follow which module is at work, and watch."""
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
        if isinstance(result, tuple):  # native_group_norm: the mean and deviation beside it stay in fp32 on a GPU
            return (self._seen(result[0], func), *result[1:])
        return self._seen(result, func)

    def _seen(self, result: Any, func: Any) -> Any:
        if not isinstance(result, Tensor) or not result.is_floating_point() or func.is_view or not result.numel():
            return result
        if self._dtype is not None:
            result = result.to(self._dtype).to(result.dtype)
        module = self._stack[-1] if self._stack else ""
        place = module if module in self._leaves else f"{module} {func.overloadpacket.__name__}".strip()
        largest = result.abs().amax().item()
        if not math.isfinite(largest) and self.first_not_finite is None:
            self.first_not_finite = place
        self.largest[place] = max(largest, self.largest.get(place, 0.0))
        return result


def probe(model: AutoencoderKL, inputs: Iterable[tuple[str, Tensor]]) -> Ranges:
    """Run inputs through the model in fp32 and see how large it gets.

    ("encoder", images) are encoded, and their latents decoded; ("decoder", latents) are decoded. Raises `NumericsError`
    where fp32 itself overflows: no scale can help then.
    """
    watched = use_portable_attention(model)
    watch = Watch(watched)
    for graph, x in inputs:
        with watch.watching():
            result = _run(watched, graph, x)
            if graph == "encoder":
                _run(watched, "decoder", result[:, : model.config.latent_channels])
        if watch.first_not_finite is not None:
            raise NumericsError(
                f"{watch.first_not_finite} gives NaN or infinity already in fp32: the weights are unusable"
            )
    return Ranges(watch.largest)


class SimulatedHalf:
    """The model as a GPU computes it in half precision: weights, and the result of every operation, rounded.

    `run` gives the output in fp32; `first_not_finite` then names the place of the first overflow, if there was one.
    """

    def __init__(self, model: AutoencoderKL, precision: str) -> None:
        dtype = HALVES[precision]
        self._model = use_portable_attention(model)
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
    model: AutoencoderKL, directory: Path | None = None, progress: Progress = lambda *_: None
) -> Iterator[tuple[str, Tensor]]:
    """What `probe` should see: photographs and noise latents, at more than one size; one at a time.

    `directory` holds the user's photographs (any depth); the embedded ones are used without it.
    """
    config, factor = model.config, model.config.downscale
    photos = photographs(directory)
    total = len(photos) + len(LATENT_SIZES)
    for done, (path, (height, width)) in enumerate(zip(photos, itertools.cycle(LATENT_SIZES))):
        progress(f"Measuring activations on {path.name}", done, total)
        yield "encoder", middle_of(path, height * factor, width * factor, config.in_channels)
    # Diffusion models work on latents of unit variance: unscaled, this is how they look.
    multiply, add = (torch.tensor(values).view(1, -1, 1, 1) for values in config.latent_affine())
    generator = torch.Generator().manual_seed(0)
    for done, (height, width) in enumerate(LATENT_SIZES, start=len(photos)):
        progress("Measuring activations on noise", done, total)
        noise = torch.randn(1, config.latent_channels, height, width, generator=generator)
        yield "decoder", noise / multiply + add
    progress("Measured", total, total)


def _run(model: AutoencoderKL, graph: str, x: Tensor) -> Tensor:
    return model.encode_moments(x) if graph == "encoder" else model.decode_latents(x)
