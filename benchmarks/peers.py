"""What benchmarks.compare compares: the table of rows, the files each needs, and the processes that open and run them.

A new backend is one line in ROWS, and one in ARTIFACTS if it opens a file that no other row opens. Nothing heavy is
imported at the top: a process holds only what its row needs, for its memory is measured.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.peak import measure_peak

if TYPE_CHECKING:
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as DiffusersVae

    from runtimes.config import VaeConfig
    from runtimes.names import Graph
    from vae_export.families.autoencoder_kl import AutoencoderKL

Array = npt.NDArray[np.float32]
Run = Callable[[str, Array], Array]  #: ("encode" or "decode", images or latents) -> moments or images
Answer = Callable[[dict[str, Any]], None]

GRAPHS: dict[str, Graph] = {"encode": "encoder", "decode": "decoder"}
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
WEIGHTS = "diffusion_pytorch_model.safetensors"
TRACE_BATCH, TRACE_HEIGHT, TRACE_WIDTH = 2, 6, 10  #: in latents; no shape that is measured


class Case(NamedTuple):
    graph: str  #: encode or decode
    size: int  #: of the image, pixels a side
    batch: int

    def __str__(self) -> str:
        return f"{self.graph} {self.size}" + (f" batch {self.batch}" if self.batch > 1 else "")

    @property
    def file(self) -> str:
        return f"{self.graph}-{self.size}-{self.batch}"


# Opening: each opens the whole VAE, encoder and decoder, as its user would --------------------------------------------


def open_torch(
    path: Path, precision: str, *, channels_last: bool = False, compiled: bool = False, device: str = "cpu"
) -> Run:
    """diffusers' AutoencoderKL. Weights and activations in fp16 or bf16 where that is the precision."""
    import torch

    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    model = diffusers_model(config, read_weights(path / WEIGHTS, channels_last)).to(device)
    if compiled:
        model.encode, model.decode = torch.compile(model.encode), torch.compile(model.decode)
    layout = torch.channels_last if channels_last else torch.contiguous_format

    @torch.no_grad()
    def run(graph: str, array: Array) -> Array:
        x = torch.from_numpy(array).to(device, model.dtype, memory_format=layout)
        y = model.encode(x).latent_dist.parameters if graph == "encode" else model.decode(x).sample
        found: Array = y.float().cpu().numpy()
        return found

    return run


def diffusers_model(config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> DiffusersVae:
    """Built without weights, then given these in their own dtype: they are in memory once."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as DiffusersVae

    with torch.device("meta"):
        model = DiffusersVae.from_config(config)
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def read_weights(path: Path, channels_last: bool) -> dict[str, torch.Tensor]:
    import torch
    from safetensors import safe_open

    weights = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  (no dictionary)
            tensor = file.get_tensor(name)
            images = channels_last and tensor.ndim == 4
            # A copy, so that the mapped file does not stay in memory beside it.
            weights[name] = tensor.clone(memory_format=torch.channels_last if images else torch.contiguous_format)
    return weights


def open_plain_onnxruntime(path: Path, precision: str, provider: str = "CPUExecutionProvider") -> Run:
    import onnxruntime

    if provider != "CPUExecutionProvider":
        onnxruntime.preload_dlls()
    sessions = {graph: onnxruntime.InferenceSession(path / f"{graph}.onnx", providers=[provider]) for graph in GRAPHS}
    for session in sessions.values():
        if session.get_providers()[0] != provider:
            raise RuntimeError(f"{provider} did not load")
    return lambda graph, x: sessions[graph].run(None, {sessions[graph].get_inputs()[0].name: x})[0]


def open_plain_openvino(path: Path, precision: str, *, reshaped: bool = False) -> Run:
    """With free sizes, as it is exported, or `reshaped` to each input's, as one may do by hand."""
    import openvino

    hint = {"fp32": openvino.Type.f32, "bf16": openvino.Type.bf16}[precision]
    core = openvino.Core()

    def request(model: Any) -> Any:
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint})
        taken = compiled.get_property("INFERENCE_PRECISION_HINT")
        if taken != hint:
            raise RuntimeError(f"asked for {hint.get_type_name()}, OpenVINO computes in {taken.get_type_name()} here")
        return compiled.create_infer_request()

    models = {graph: core.read_model(path / f"{graph}.xml") for graph in GRAPHS}
    requests = {} if reshaped else {graph: request(model) for graph, model in models.items()}

    def run(graph: str, x: Array) -> Array:
        if graph not in requests:  # a benchmark's process runs one size
            models[graph].reshape(list(x.shape))
            requests[graph] = request(models[graph])
        found: Array = requests[graph].infer([x])[0]
        return found

    return run


def open_ours(path: Path, precision: str, **options: Any) -> Run:
    from runtimes import open_vae

    vae = open_vae(path, **options)
    return lambda graph, x: vae.encode(x)[0].parameters if graph == "encode" else vae.decode(x)[0]


# Writing what is opened -----------------------------------------------------------------------------------------------


def write_diffusers(model: AutoencoderKL, path: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import save_file

    model.save_pretrained(path)
    weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in model.state_dict().items()}
    save_file(weights, path / WEIGHTS)


def diffusers_graphs(model: AutoencoderKL, path: Path) -> Iterator[tuple[str, torch.nn.Module, torch.Tensor]]:
    """(graph, module, an input to trace it with) of diffusers' model with our weights."""
    import torch

    path.mkdir()
    theirs = diffusers_model(json.loads(model.config.to_json()), model.state_dict())

    class Encode(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vae = theirs

        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            moments: torch.Tensor = self.vae.encode(sample).latent_dist.parameters
            return moments

    class Decode(Encode):
        def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
            images: torch.Tensor = self.vae.decode(latent_sample, return_dict=False)[0]
            return images

    config, factor = model.config, model.config.downscale
    image = (config.in_channels, TRACE_HEIGHT * factor, TRACE_WIDTH * factor)
    yield "encode", Encode(), torch.zeros(TRACE_BATCH, *image)
    yield "decode", Decode(), torch.zeros(TRACE_BATCH, config.latent_channels, TRACE_HEIGHT, TRACE_WIDTH)


def write_plain_onnx(model: AutoencoderKL, path: Path) -> None:
    import torch

    for graph, module, example in diffusers_graphs(model, path):
        free = (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),)
        torch.onnx.export(module, (example,), path / f"{graph}.onnx", dynamo=True, dynamic_shapes=free)


def write_plain_openvino(model: AutoencoderKL, path: Path) -> None:
    import openvino

    for graph, module, example in diffusers_graphs(model, path):
        shape = openvino.PartialShape([-1, example.shape[1], -1, -1])
        converted = openvino.convert_model(module, example_input=example, input=[shape])
        openvino.save_model(converted, path / f"{graph}.xml", compress_to_fp16=False)  # fp32 is to be fp32


def write_ours(model: AutoencoderKL, path: Path, target: str, precision: str) -> None:
    from vae_export.export import export_bundle

    export_bundle(model, path, target=target, precision=precision, run_validation=False)


# What is compared -----------------------------------------------------------------------------------------------------

ARTIFACTS: dict[str, Callable[[AutoencoderKL, Path], None]] = {
    "diffusers-fp32": partial(write_diffusers, dtype="float32"),
    "diffusers-bf16": partial(write_diffusers, dtype="bfloat16"),
    "diffusers-fp16": partial(write_diffusers, dtype="float16"),
    "plain-onnx": write_plain_onnx,
    "plain-openvino": write_plain_openvino,
    "ours-onnx-fp32": partial(write_ours, target="onnx", precision="fp32"),
    "ours-onnx-fp16": partial(write_ours, target="onnx", precision="fp16"),
    "ours-openvino-fp32": partial(write_ours, target="openvino", precision="fp32"),
    "ours-openvino-bf16": partial(write_ours, target="openvino", precision="bf16"),
    "ours-flax-fp32": partial(write_ours, target="flax", precision="fp32"),
    "ours-flax-bf16": partial(write_ours, target="flax", precision="bf16"),
    "ours-openvino-int8": partial(write_ours, target="openvino", precision="int8"),
}
#: what rows import; imported before the clock of loading starts
TORCH = ("torch", "safetensors", "diffusers.models.autoencoders.autoencoder_kl")
OURS = ("runtimes",)


class Row(NamedTuple):
    name: str
    precision: str
    ours: bool
    artifact: str  #: key of ARTIFACTS
    modules: tuple[str, ...]
    open: Callable[[Path, str], Run]

    def __str__(self) -> str:
        return f"{self.name} {self.precision}"


reshaped = partial(open_plain_openvino, reshaped=True)
channels_last = partial(open_torch, channels_last=True)
compiled = partial(open_torch, channels_last=True, compiled=True)
ROWS = (
    Row("torch", "fp32", False, "diffusers-fp32", TORCH, open_torch),
    Row("torch channels_last", "fp32", False, "diffusers-fp32", TORCH, channels_last),
    Row("torch.compile", "fp32", False, "diffusers-fp32", TORCH, compiled),
    Row("onnxruntime plain", "fp32", False, "plain-onnx", ("onnxruntime",), open_plain_onnxruntime),
    Row("openvino plain", "fp32", False, "plain-openvino", ("openvino",), open_plain_openvino),
    Row("openvino reshaped", "fp32", False, "plain-openvino", ("openvino",), reshaped),
    Row("ours onnxruntime", "fp32", True, "ours-onnx-fp32", (*OURS, "onnxruntime"), open_ours),
    Row("ours openvino", "fp32", True, "ours-openvino-fp32", (*OURS, "openvino"), open_ours),
    Row("ours flax", "fp32", True, "ours-flax-fp32", (*OURS, "jax"), open_ours),
    Row("torch channels_last", "bf16", False, "diffusers-bf16", TORCH, channels_last),
    Row("torch.compile", "bf16", False, "diffusers-bf16", TORCH, compiled),
    Row("openvino plain", "bf16", False, "plain-openvino", ("openvino",), open_plain_openvino),
    Row("openvino reshaped", "bf16", False, "plain-openvino", ("openvino",), reshaped),
    Row("ours openvino", "bf16", True, "ours-openvino-bf16", (*OURS, "openvino"), open_ours),
    Row("ours openvino", "int8", True, "ours-openvino-int8", (*OURS, "openvino"), open_ours),
)
#: the same on an NVIDIA GPU (--device cuda); arrays come from the host and go back there in every row. PyTorch and ONNX
#: Runtime convolve in TF32 there unless told otherwise: what peers call fp32 has the mantissa of fp16.
CUDA: dict[str, Any] = {"device": "cuda"}
PROFILES = ("1..4x256..1024x256..1024@1x512x512",)


def ours_on_gpu(backend: str, module: str, precision: str, target: str = "onnx", **options: Any) -> Row:
    opened = partial(open_ours, backend=backend, **CUDA | options)
    return Row(f"ours {backend}", precision, True, f"ours-{target}-{precision}", (*OURS, module), opened)


GPU_ROWS = (
    Row("torch cuda", "fp32", False, "diffusers-fp32", TORCH, partial(open_torch, **CUDA)),
    Row("torch cuda channels_last", "fp32", False, "diffusers-fp32", TORCH, partial(channels_last, **CUDA)),
    Row(
        "onnxruntime plain cuda",
        "fp32",
        False,
        "plain-onnx",
        ("onnxruntime",),
        partial(open_plain_onnxruntime, provider="CUDAExecutionProvider"),
    ),
    ours_on_gpu("onnxruntime", "onnxruntime", "fp32"),
    ours_on_gpu("flax", "jax", "fp32", "flax", device="gpu"),
    Row("torch cuda channels_last", "fp16", False, "diffusers-fp16", TORCH, partial(channels_last, **CUDA)),
    Row("torch.compile cuda", "fp16", False, "diffusers-fp16", TORCH, partial(compiled, **CUDA)),
    ours_on_gpu("onnxruntime", "onnxruntime", "fp16"),
    ours_on_gpu("tensorrt", "tensorrt", "fp16", profiles=PROFILES),
    ours_on_gpu("tensorrt-rtx", "tensorrt_rtx", "fp16", profiles=PROFILES),
    Row("torch cuda channels_last", "bf16", False, "diffusers-bf16", TORCH, partial(channels_last, **CUDA)),
    ours_on_gpu("flax", "jax", "bf16", "flax", device="gpu"),
)


# The process of one row -----------------------------------------------------------------------------------------------


def work(answer: Answer, directory: Path, name: str, case: Case) -> None:
    """Open the row, then run one call for each line on standard input, asleep in between."""
    with contextlib.suppress(OSError):  # if memory runs out, this process is to go, and no other
        Path("/proc/self/oom_score_adj").write_text("1000")
    row = next(row for row in (*ROWS, *GPU_ROWS) if str(row) == name)
    for module in row.modules:
        importlib.import_module(module)
    x = np.load(directory / f"{case.file}-input.npy")
    start = time.perf_counter()
    run = row.open(directory / row.artifact, row.precision)
    answer({"load_seconds": time.perf_counter() - start})
    waiting_since, cpu = time.perf_counter(), time.process_time()
    for line in sys.stdin:
        idle = {"idle_seconds": time.perf_counter() - waiting_since, "idle_cpu_seconds": time.process_time() - cpu}
        start = time.perf_counter()
        y = run(case.graph, x)
        seconds = time.perf_counter() - start
        memory = gpu_memory() if row in GPU_ROWS else peak_memory()
        if line.strip() == "keep":
            np.save(directory / "output.npy", y)
        waiting_since, cpu = time.perf_counter(), time.process_time()
        answer({"seconds": seconds, "peak_memory_gb": memory, **idle})


def peak_memory() -> float | None:
    """GB of this process so far. Not ru_maxrss: on Linux that starts with what the parent process held."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e9
    return None


def gpu_memory() -> float | None:
    """GB of the GPU's memory that this process holds: every row here keeps what it once took."""
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, ValueError):
        said = subprocess.run(command, capture_output=True, text=True).stdout
        held = dict(line.split(", ") for line in said.splitlines())
        return int(held[str(os.getpid())]) * 2**20 / 1e9 if str(os.getpid()) in held else None
    return None


# The processes that prepare -------------------------------------------------------------------------------------------


def prepare(answer: Answer, directory: Path, name: str, cases: Sequence[tuple[Case, bool]], device: str) -> None:
    """Write the input of each case, and the reference's output where the case is to be compared; measure the peak."""
    model = make_model(name)
    answer({"parameters": sum(parameter.numel() for parameter in model.parameters())})
    for case, compared in cases:
        x = make_input(model, case, photos=name == "tiny")
        np.save(directory / f"{case.file}-input.npy", x)
        if compared:
            np.save(directory / f"{case.file}-reference.npy", reference(model, case.graph, x))
        answer({"gflop": count_flops(model, case.graph, x.shape) / 1e9})
    answer({"peak_gflops": {precision: measure_peak(precision, device) for precision in PRECISIONS}})


def export(answer: Answer, directory: Path, name: str, artifacts: Sequence[str]) -> None:
    """Write the artifacts; an answer for each, with the reason where it failed."""
    model = make_model(name)
    for artifact in artifacts:
        start, failed = time.perf_counter(), None
        try:
            ARTIFACTS[artifact](model, directory / artifact)
        except Exception as error:  # whatever an exporter raises is the reason of its rows
            failed = reason(error)
        answer({"seconds": time.perf_counter() - start, "failed": failed})


def make_model(name: str) -> AutoencoderKL:
    from benchmarks.models import stable_diffusion_sized
    from vae_export import AutoencoderKL, load_model

    model = stable_diffusion_sized() if name == "sd" else load_model()
    assert isinstance(model, AutoencoderKL)
    return model


def make_input(model: AutoencoderKL, case: Case, photos: bool) -> Array:
    """Photographs where the weights are trained; for random weights uniform images and latents of unit variance."""
    from vae_export.photos import middle_of, photographs

    config = model.config
    if not photos:
        return random_input(config, case)
    image = (case.batch, config.in_channels, case.size, case.size)
    paths = photographs()
    chosen = [middle_of(paths[i % len(paths)], *image[2:], config.in_channels).numpy() for i in range(case.batch)]
    images = np.concatenate(chosen)
    return images if case.graph == "encode" else reference(model, "encode", images)[:, : config.latent_channels].copy()


def random_input(config: VaeConfig, case: Case) -> Array:
    """The first image is the same in every batch."""
    rng, factor = np.random.default_rng(0), config.downscale
    if case.graph == "encode":
        return rng.uniform(-1, 1, (case.batch, config.in_channels, case.size, case.size)).astype(np.float32)
    latents = (case.batch, config.latent_channels, case.size // factor, case.size // factor)
    return rng.standard_normal(latents).astype(np.float32)


def reference(model: AutoencoderKL, graph: str, x: Array) -> Array:
    import torch

    with torch.no_grad():
        function = model.encode_moments if graph == "encode" else model.decode_latents
        return function(torch.from_numpy(x)).numpy()


def count_flops(model: AutoencoderKL, graph: str, shape: Sequence[int]) -> int:
    """Of the model as it is written, two for a multiplication and addition, without computing anything."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    shadow = copy.deepcopy(model).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        (shadow.encode_moments if graph == "encode" else shadow.decode_latents)(torch.empty(shape, device="meta"))
    return int(counter.get_total_flops())


# Every process --------------------------------------------------------------------------------------------------------


def reason(error: BaseException) -> str:
    """On one line: the type, and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is not to come between the answers

    def answer(found: dict[str, Any]) -> None:
        print(json.dumps(found), file=answers, flush=True)

    job = json.loads(sys.argv[1])
    directory = Path(job["directory"])
    try:
        if job["do"] == "prepare":
            cases = [(Case(*case), compared) for case, compared in job["cases"]]
            prepare(answer, directory, job["model"], cases, job["device"])
        elif job["do"] == "export":
            export(answer, directory, job["model"], job["artifacts"])
        else:
            work(answer, directory, job["row"], Case(*job["case"]))
    except Exception as error:  # whatever a backend raises is the reason of its row
        answer({"failed": reason(error)})


if __name__ == "__main__":
    main()
