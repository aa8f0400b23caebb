"""Latents of whole datasets: resumable, on one machine or on a Ray cluster."""
