"""A benchmark: a grid of experiments played to the end.

``grid`` reads the definition and makes every cell's config, ``directory`` guards where a benchmark lies, ``running``
plays what is missing on one Ray cluster, ``display`` shows how it gets on.
"""
