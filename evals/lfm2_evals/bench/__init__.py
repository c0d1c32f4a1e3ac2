"""Benchmarks of speed: ours and named peers, measured in the same minutes on the same files."""
