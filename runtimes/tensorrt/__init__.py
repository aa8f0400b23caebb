"""TensorRT and TensorRT-RTX: building engines, keeping them, running them."""
