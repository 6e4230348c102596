"""Figures of the formats in which frozen weights are held (quantize.py), for torch and Triton alike."""

FP8_MAX, INT8_MAX = 448.0, 127.0
"""Largest magnitude of e4m3, and of int8 as it is used."""
NF4_BLOCK = 64
"""Weights along K that share an nf4 block scale."""
