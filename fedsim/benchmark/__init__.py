"""A benchmark: a grid of experiments played to the end.

``definition`` reads what was written, ``grid`` makes every cell's config of it, ``jobs`` the runs to be played, shared
clean twins among them. ``directory`` guards where a benchmark lies, ``running`` plays what is missing on one Ray
cluster, ``worker`` is what its tasks do, ``display`` shows how it gets on.
"""
