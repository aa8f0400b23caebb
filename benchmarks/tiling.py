"""What tiling costs and what it does to an image: python -m benchmarks.tiling

Time and memory: a model of Stable Diffusion's size with random weights, each row in a process of its own. Quality: the
embedded model on the embedded photographs, tiled against untiled; "blended" is the tiling of diffusers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.memory_model import status
from runtimes import children, open_vae
from runtimes.image_files import load_image
from runtimes.images import to_float
from runtimes.tiling.settings import TILINGS

MODES = ("untiled", *TILINGS)
PHOTO_SIDE, PHOTO_TILES = 512, (256, 128)  #: pixels


def measure(bundle: str, mode: str, side: int, tile: int) -> dict[str, float]:
    """Decode one square image: seconds, and the peak of this process's memory, before and at the end, in GB."""
    with open_vae(bundle) as vae:
        if mode in TILINGS:
            vae.enable_tiling(mode)
            vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // vae.config.downscale
        latents = np.random.default_rng(0).standard_normal((1, 4, side // 8, side // 8), np.float32)
        opened = status("VmHWM") / 2**30
        start = time.perf_counter()
        vae.decode(latents)
        seconds = time.perf_counter() - start
    peak = status("VmHWM") / 2**30
    return {"seconds": seconds, "us_per_pixel": seconds / side**2 * 1e6, "opened_gb": opened, "peak_gb": peak}


def quality(directory: Path, target: str) -> None:
    """Print the PSNR of tiled against untiled results, over the photographs: worst and median."""
    from vae_export import export_bundle, load_model
    from vae_export.photos import photographs

    path = directory / "embedded"
    export_bundle(load_model(), path, target=target, tileable=True, run_validation=False)
    print(f"\nEmbedded model, trained: photographs of {PHOTO_SIDE} pixels, tiled against untiled, PSNR in dB")
    with open_vae(path) as vae:
        found: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for photo in photographs():
            pixels = load_image(photo)[:PHOTO_SIDE, :PHOTO_SIDE]
            height, width = (size - size % vae.config.downscale for size in pixels.shape[:2])
            x = to_float(pixels[None, :height, :width])
            vae.disable_tiling()
            moments = vae.encode(x)[0].parameters
            z = moments[:, : vae.config.latent_channels]
            image = vae.decode(z)[0]
            for mode in TILINGS:
                for tile in PHOTO_TILES:
                    vae.enable_tiling(mode)
                    vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // vae.config.downscale
                    pair = _psnr(vae.encode(x)[0].parameters, moments), _psnr(vae.decode(z)[0], image)
                    found.setdefault((mode, tile), []).append(pair)
    for (mode, tile), pairs in found.items():
        encoded, decoded = (sorted(values) for values in zip(*pairs, strict=True))
        half = len(pairs) // 2
        print(
            f"{mode:9} tiles of {tile}: encoded {encoded[0]:.1f} (median {encoded[half]:.1f}), "
            f"decoded {decoded[0]:.1f} (median {decoded[half]:.1f}); {len(pairs)} photographs"
        )


def _psnr(actual: np.ndarray, expected: np.ndarray) -> float:  # type: ignore[type-arg]
    span = float(expected.max() - expected.min())
    return float(10 * np.log10(span**2 / np.mean((actual.astype(np.float64) - expected) ** 2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="onnx", help="of the bundles")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--tile", type=int, default=512, help="side of a tile, pixels")
    parser.add_argument("--rows", nargs="+", default=[f"{mode}:{side}" for mode in MODES for side in (1024, 2048)])
    parser.add_argument("--one", nargs=3, metavar=("BUNDLE", "MODE", "SIDE"), help="measure one row in this process")
    arguments = parser.parse_args()
    if arguments.one:
        bundle, mode, side = arguments.one
        print(json.dumps(measure(bundle, mode, int(side), arguments.tile)))
        return
    from benchmarks.models import stable_diffusion_sized  # not where a row is measured: PyTorch needs memory, too
    from vae_export.export import export_bundle

    with tempfile.TemporaryDirectory() as directory:
        bundle = f"{directory}/sd"
        export_bundle(
            stable_diffusion_sized(),
            bundle,
            target=arguments.target,
            precision=arguments.precision,
            tileable=True,
            run_validation=False,
        )
        print(
            f"SD-sized, random weights, {arguments.target} {arguments.precision}: decode in tiles of {arguments.tile}"
        )
        for row in arguments.rows:
            mode, side = row.split(":")
            command = children.command("benchmarks.tiling", "--tile", str(arguments.tile), "--one", bundle, mode, side)
            environment = children.environment()
            said = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            if said.returncode:
                print(f"{mode:9} {side}: failed ({said.returncode}): {said.stderr.strip().splitlines()[-1:]}")
                continue
            found = json.loads(said.stdout)
            print(
                f"{mode:9} {side:>4}: {found['seconds']:6.1f} s, {found['us_per_pixel']:5.1f} us/pixel, "
                f"peak {found['peak_gb']:5.2f} GB ({found['opened_gb']:.2f} when opened)",
                flush=True,
            )
        quality(Path(directory), arguments.target)


if __name__ == "__main__":
    main()
