"""Stage jax: the Flax model under jit, in each precision; params and images stay on the card.

"donated" gives the input's buffer to the call, which a service does that needs it no more; JAX's answer is noted.
fp32 is computed with JAX's precision "highest"; its own choice on a GPU is TF32.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.stage import HostClock, Lacks, Stage, Way, error_of, require, timed
from benchmarks.peers import Case

PLAIN, DONATED, RUNTIME = "jit", "jit, donated", "as users have it"
#: precision -> type of weights and activations, JAX's precision of products
PRECISIONS: dict[str, tuple[str, str | None]] = {
    "fp32": ("float32", "highest"),
    "tf32": ("float32", None),
    "bf16": ("bfloat16", None),
    "fp16": ("float16", None),
}


def ways(rehearsal: bool) -> list[Way]:
    """All that is measured, the most telling first."""
    if rehearsal:
        few = [("fp32", PLAIN, "decode"), ("bf16", DONATED, "encode"), ("fp16", PLAIN, "decode")]
        found = [Way("sd", Case(graph, 64, 1), precision, how) for precision, how, graph in few]
        return [*found, Way("flux", Case("encode", 64, 2), "bf16", RUNTIME)]
    found = []
    for size in (1024, 512):
        for graph in ("decode", "encode"):
            found.append(Way("sd", Case(graph, size, 1), "bf16", PLAIN))
            found.append(Way("sd", Case(graph, size, 1), "fp16", PLAIN))
    found += [
        Way("sd", Case(graph, 512, 1), "bf16", how) for how in (DONATED, RUNTIME) for graph in ("decode", "encode")
    ]
    found += [Way("sd", Case(graph, 512, 1), p, PLAIN) for p in ("tf32", "fp32") for graph in ("decode", "encode")]
    found += [Way("flux", Case(graph, 1024, 1), "bf16", PLAIN) for graph in ("decode", "encode")]
    found += [Way("sd", Case(graph, 512, 4), "bf16", PLAIN) for graph in ("decode", "encode")]
    found += [Way("sd", Case(graph, 1024, 1), p, PLAIN) for p in ("tf32", "fp32") for graph in ("decode", "encode")]
    return found + [Way("sd", Case(graph, 2048, 1), "bf16", PLAIN) for graph in ("decode", "encode")]


def run(stage: Stage) -> None:
    jax = require("jax", "it is what is measured")
    require("flax", "the model is written in it")
    kind = jax.default_backend()
    if not stage.rehearsal and kind != "gpu":
        raise Lacks(f"a GPU: JAX {jax.__version__} runs on {kind} here")
    stage.note(f"JAX {jax.__version__} on {jax.devices()[0].device_kind}")
    for way in ways(stage.rehearsal):
        stage.measure(way.name, way.facts, lambda way=way: measure(stage, jax, way))  # type: ignore[misc]


def measure(stage: Stage, jax: Any, way: Way) -> dict[str, Any]:
    array = stage.made.input(way.model, way.case)
    if way.how == RUNTIME:
        found, y = as_users_have_it(stage, way, array)
    else:
        found, y = jitted(stage, jax, way, array)
    found["flop"] = stage.made.flop(way.model, way.case)
    return found | error_of(y, stage, way.model, way.case)


def jitted(stage: Stage, jax: Any, way: Way, array: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    model, params = loaded(stage.made.checkpoint(way.model), way.precision)
    dtype = PRECISIONS[way.precision][0]

    def function(params: Any, x: Any) -> Any:
        if way.case.graph == "decode":
            return model.apply({"params": params}, x, method=model.decode).sample
        moments = model.apply({"params": params}, x, method=model.encode).latent_dist.parameters
        return moments.transpose(0, 3, 1, 2)

    given = jax.device_put(array.astype(dtype))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jit = jax.jit(function, donate_argnums=(1,) if way.how == DONATED else ())
        compiled = jit.lower(params, given).compile()
        memory = compiled.memory_analysis()
        inputs, answers = [given], list[Any]()

        def before() -> None:  # a donated buffer is gone after the call
            inputs[:] = [jax.block_until_ready(given + 0)]

        def call() -> None:
            answers.clear()
            answers.append(compiled(params, inputs[0]))

        clock = HostClock(lambda: jax.block_until_ready(answers))
        found = timed(call, clock, stage, before)
    said = sorted({" ".join(str(warning.message).split())[:200] for warning in caught})
    if said:
        found["said"] = "; ".join(said)
    if memory is not None:
        sizes = (memory.temp_size_in_bytes, memory.argument_size_in_bytes, memory.output_size_in_bytes)
        found["peak_memory_gb"] = sum(sizes) / 1e9
    return found, np.asarray(answers[0].astype("float32"))


@lru_cache(maxsize=1)
def loaded(checkpoint: Path, precision: str) -> tuple[Any, Any]:
    import jax

    from runtimes.flax.model import FlaxAutoencoderKL

    dtype, products = PRECISIONS[precision]
    model, params = FlaxAutoencoderKL.from_pretrained(checkpoint, from_pt=True, dtype=dtype, precision=products)
    return model, jax.device_put(jax.tree.map(lambda leaf: leaf.astype(dtype), params))


def as_users_have_it(stage: Stage, way: Way, x: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """A bundle in `runtimes`, NumPy in and out."""
    from runtimes import open_vae

    device = "cpu" if stage.rehearsal else "gpu"
    with open_vae(stage.made.bundle(way.model, "flax", way.precision), device=device) as vae:

        def call() -> np.ndarray:
            found: np.ndarray = vae.decode(x)[0] if way.case.graph == "decode" else vae.encode(x)[0].parameters
            return found

        found = timed(call, HostClock(), stage)
        return found, call()
