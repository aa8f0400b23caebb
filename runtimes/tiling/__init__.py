"""Tiling: process a large image in parts.

`blended` is the tiling of diffusers, `seamless` gives the untiled result, `budget` computes the memory of a call, and
`tiler` chooses the size of the tiles.
"""
