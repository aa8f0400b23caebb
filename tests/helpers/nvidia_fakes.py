"""NVIDIA's packages are those of `tests/fakes`, in this process and those that it starts."""

import contextlib
import importlib
import os
import sys
from pathlib import Path

import pytest

from runtimes.tensorrt import flavours as tensorrt_flavours

FAKES = Path(__file__).parents[1] / "fakes"
FAKED = ("cuda", "tensorrt", "tensorrt_rtx", "cupy", "fake_gpu", "fake_tensorrt")  # and what is below them


@contextlib.contextmanager
def fakes_of_nvidia(violations):
    """In this process and those that it starts, NVIDIA's packages are those of `tests/fakes` -> the GPU.

    `violations` is a file in which other processes leave the rules that they broke. Whatever real packages were loaded
    are themselves again afterwards.
    """
    real = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in FAKED}
    flavours = dict(tensorrt_flavours._loaded)
    tensorrt_flavours._loaded.clear()
    paths = [str(FAKES), *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FAKES)
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("FAKE_GPU_VIOLATIONS", str(violations))
        try:
            yield importlib.import_module("fake_gpu").gpu
        finally:
            for name in [name for name in sys.modules if name.partition(".")[0] in FAKED]:
                del sys.modules[name]
            sys.modules.update(real)
            tensorrt_flavours._loaded.clear()
            tensorrt_flavours._loaded.update(flavours)


def in_use(gpu):
    return {kind: found for kind in ("blocks", "streams", "captures", "graphs") if (found := len(getattr(gpu, kind)))}
