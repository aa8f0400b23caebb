"""Families of VAEs, one module each: the reference network and what is particular to it."""
