"""The command line: ``fedsim run``, ``bench``, ``validate``, ``list``, ``describe``, ``report``, ``compare``."""

from fedsim.cli.commands import app, guarded, main

__all__ = ["app", "guarded", "main"]
