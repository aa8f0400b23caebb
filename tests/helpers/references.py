"""What the reference makes of inputs, and objects that are still alive."""

import gc

import torch

from vae_export.comparison import Case


def alive(references):
    gc.collect()
    return [reference() for reference in references if reference() is not None]


def cases(model, arrays):
    """Arrays, images and latents, with what the reference makes of them."""
    for x in arrays:
        graph, function = ("encoder", model.encode_moments) if x.shape[1] == 3 else ("decoder", model.decode_latents)
        yield Case(graph, "array", x, function(torch.from_numpy(x)).numpy())
