"""Triggers on images: patterns drawn onto any image, and sets of images that are the backdoor themselves."""

from fedsim.tasks.triggers import examples, patterns

__all__ = ["examples", "patterns"]
