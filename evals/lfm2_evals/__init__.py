"""Benchmarks of answers and of speed, over the frontends: what a model gets right, and how soon.

It sits on top of everything: it may import any frontend and the core, and neither imports it.
"""
