"""Models of packed weights: what is stored in how many bits, and how it takes its place.

The arithmetic is `lfm2_mm.kernels`; this wing knows modules, checkpoints and GGUF files.
"""
