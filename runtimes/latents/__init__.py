"""Latents of encoded datasets: `LatentDataset` reads the shards that `vae-export encode-dataset` writes."""

from runtimes.latents.dataset import LatentDataset

__all__ = ["LatentDataset"]
