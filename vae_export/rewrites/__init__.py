"""Exact rewrites of models, one per module. Each returns a model that computes the same function as its argument."""
