"""Triggers: patterns drawn onto any image, sets of images that are the backdoor themselves, and words."""

from fedsim.tasks.triggers import examples, next_word, patterns, sentiment

__all__ = ["examples", "next_word", "patterns", "sentiment"]
