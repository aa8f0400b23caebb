"""The entries by which bytes of strangers come in. Whatever they are, the answer is a value, or a `VaeError`.

Each takes the bytes of one file, as a fuzzer makes them; `seeds` are good ones to begin with.
"""

import json
import os
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from onnx import TensorProto, helper
from PIL import Image
from safetensors.torch import save

from runtimes.config import VaeConfig
from runtimes.errors import VaeError
from runtimes.image_files import load_image
from runtimes.ir_scan import check_ir
from runtimes.latents.shards import SCHEMA_VERSION, latents_digest, open_shard
from runtimes.manifest import Manifest
from runtimes.onnx_scan import check_onnx
from vae_export.checkpoints.load import EMBEDDED, load_model
from vae_export.families.autoencoder_kl import AutoencoderKL

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CASES = Path(__file__).parents[1] / "fuzz" / "cases"  #: CASES/ENTRY/*: what was found, to be found no more


#: what the seed of checkpoints is one of
SMALL = VaeConfig(
    block_out_channels=(8,),
    down_block_types=("DownEncoderBlock2D",),
    up_block_types=("UpDecoderBlock2D",),
    layers_per_block=1,
    norm_num_groups=4,
)


@contextmanager
def a_file(data: bytes, suffix: str) -> Iterator[Path]:
    descriptor, name = tempfile.mkstemp(suffix=suffix)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        yield Path(name)
    finally:
        os.unlink(name)


def manifest(data: bytes) -> None:
    said = Manifest.from_json(data)
    assert Manifest.from_json(said.to_json().encode()) == said


def config(data: bytes) -> None:
    with a_file(data, ".json") as path:
        said = VaeConfig.from_json(path)
    assert VaeConfig.from_dict(said.to_dict()) == said


def checkpoint(data: bytes) -> None:
    with a_file(data, ".safetensors") as path:
        load_model(path, config=SMALL)


def image(data: bytes) -> None:
    with a_file(data, ".img") as path:
        pixels = load_image(path)
    assert pixels.ndim == 3 and pixels.shape[2] == 3


def onnx(data: bytes) -> None:
    check_onnx(data, "model.onnx")


def ir(data: bytes) -> None:
    check_ir(data, "model.xml")


def latents(data: bytes) -> None:
    with a_file(data, ".safetensors") as path:
        shard = open_shard(path)
        for entry in range(min(len(shard), 4)):
            shard.latents(entry)


ENTRIES: dict[str, Callable[[bytes], None]] = {
    entry.__name__: entry for entry in (manifest, config, checkpoint, image, onnx, ir, latents)
}


def survives(entry: str, data: bytes) -> bool:
    """Whether the bytes were taken; raises what is no VaeError, and for one that cannot be shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of broken tags
        try:
            ENTRIES[entry](data)
        except VaeError as error:
            str(error).encode()  # a lone surrogate could not be printed
            return False
    return True


def seeds(entry: str) -> Iterator[bytes]:
    """Good files for an entry."""
    suffix = {"manifest": "/manifest.json", "config": "/config.json", "onnx": ".onnx", "ir": ".xml"}.get(entry)
    if suffix is not None:
        for packed in sorted(GOLDEN.glob("*.tar.xz")):
            with tarfile.open(packed) as archive:
                for member in archive:
                    if member.name.endswith(suffix):
                        file = archive.extractfile(member)
                        assert file is not None
                        yield file.read()
    if entry == "onnx":
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
        weight = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
        graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weight])
        yield helper.make_model(graph).SerializeToString()
    if entry == "ir":
        yield b'<?xml version="1.0"?><net name="g"><layers><layer id="0" type="Relu" version="opset1"/></layers></net>'
    if entry == "config":
        yield (EMBEDDED / "config.json").read_bytes()
    if entry == "checkpoint":
        yield small_checkpoint()
    if entry == "image":
        for name in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "PPM"):
            with tempfile.TemporaryFile() as file:
                Image.radial_gradient("L").resize((24, 16)).convert("RGB").save(file, name)
                file.seek(0)
                yield file.read()
    if entry == "latents":
        stored = torch.zeros(1, 4, 2, 3, dtype=torch.float16)
        digest = latents_digest(stored[0].numpy(), "float16")
        tensors = {
            "latents.2x3": stored,
            "latents_sha256": torch.tensor([list(digest)], dtype=torch.uint8),
            "ids": torch.tensor([97], dtype=torch.uint8),
            "id_ends": torch.tensor([1]),
            "flipped": torch.tensor([False]),
            "sha256": torch.zeros(1, 32, dtype=torch.uint8),
            **{name: torch.ones(1, 2, dtype=torch.int32) for name in ("original_size", "resized", "crop")},
        }
        yield save(tensors, {"schema_version": str(SCHEMA_VERSION), "dtype": "float16", "failures": json.dumps([])})


def small_checkpoint() -> bytes:
    """The weights of a whole model, of 8 channels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoencoderKL(SMALL)
    return save({name: tensor.contiguous() for name, tensor in model.state_dict().items()})
