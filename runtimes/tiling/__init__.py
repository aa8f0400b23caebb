"""Tiling: a large image in parts.

`blended` is the tiling of diffusers, `seamless` gives the untiled result, and `budget` says how large a part may be.
"""
