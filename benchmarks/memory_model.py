"""How much memory a call needs, for `runtimes.tiling.budget.RATES`: python -m benchmarks.memory_model

A model of Stable Diffusion's size with random weights; each number is the growth of a fresh process's peak over one
call.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from runtimes import children, open_vae

BUNDLES = (("onnx", "fp32"), ("onnx", "fp16"), ("openvino", "fp32"), ("openvino", "fp16"), ("openvino", "bf16"))
SIDES = (512, 1024)
TILE = 384  #: pixels, of seamless tiling


def status(name: str) -> int:
    """A line of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def growth(bundle: str, graph: str, side: int, tiling: str) -> int:
    """Bytes by which this process's peak grows over one call; what goes in and comes out is not counted."""
    with open_vae(bundle) as vae:
        if tiling:
            vae.enable_tiling(tiling)
            vae.tile_sample_min_size, vae.tile_latent_min_size = TILE, TILE // 8
            # Once on a small one, which is in more than one tile: it loads the steps.
            vae.decode(np.zeros((1, 4, TILE // 8, TILE // 8 + 8), np.float32))
        rng = np.random.default_rng(0)
        shape = (1, 3, side, side) if graph == "encoder" else (1, 4, side // 8, side // 8)
        x = rng.uniform(-1, 1, shape).astype(np.float32)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = status("VmRSS")
        result = vae.encode(x)[0].parameters if graph == "encoder" else vae.decode(x)[0]
        return status("VmHWM") - before - int(result.nbytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--one", nargs=4, metavar=("BUNDLE", "GRAPH", "SIDE", "TILING"))
    arguments = parser.parse_args()
    if arguments.one:
        bundle, graph, side, tiling = arguments.one
        print(json.dumps(growth(bundle, graph, int(side), "" if tiling == "none" else tiling)))
        return
    from benchmarks.models import stable_diffusion_sized  # not where it is measured
    from vae_export import export_bundle
    from vae_export.targets import target_named

    model = stable_diffusion_sized()
    width = model.config.block_out_channels[0]
    for target, precision in BUNDLES:
        with tempfile.TemporaryDirectory() as directory:
            tileable = target_named(target).tileable
            bundle = f"{directory}/sd"
            export_bundle(model, bundle, target=target, precision=precision, tileable=tileable, run_validation=False)
            for tiling in ("none", "seamless") if tileable else ("none",):
                for graph in ("encoder", "decoder") if tiling == "none" else ("decoder",):
                    for side in SIDES:
                        command = children.command("benchmarks.memory_model")
                        command += ["--one", bundle, graph, str(side), tiling]
                        said = subprocess.run(
                            command, capture_output=True, text=True, check=True, env=children.environment()
                        ).stdout
                        used = int(said)
                        print(
                            f"{target:8} {precision} {graph} {side:>4} {tiling:8}: {used / 2**30:5.2f} GiB, "
                            f"{used / side**2 / width:5.1f} bytes a value",
                            flush=True,
                        )


if __name__ == "__main__":
    main()
