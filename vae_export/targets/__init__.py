"""Targets, one module each: how the graphs of a bundle are written for one runtime."""
