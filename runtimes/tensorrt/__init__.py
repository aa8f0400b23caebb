"""TensorRT and TensorRT-RTX: build engines, cache them, run them."""
