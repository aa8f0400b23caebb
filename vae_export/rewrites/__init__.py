"""Exact rewrites, one module each: a model in, a model out that computes the same function."""
