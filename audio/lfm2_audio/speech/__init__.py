"""The speech world of nano-audio: sentences, voices, synthesis, augmentation, manifests.

Needed when it trains and is scored, never when it runs.
"""
