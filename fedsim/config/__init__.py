"""The configuration: schema, merge and validation.

A config file is YAML. It may name parents (``defaults: base``, or a list), from which it takes everything but their
``name``; the command line overrides with ``key=value``. Everything wrong is reported together, before anything is
loaded. A section that chooses a plugin (``attack``, ``attack.trigger``, ``task.data`` …) holds its ``name`` with the
plugin's own parameters beside it; a plain string is short for ``{name: …}``. Choosing another name drops the
parameters of the one chosen before.
"""

from fedsim.config.checking import build, type_name
from fedsim.config.reading import config_directory, find, load_config, merge, shipped
from fedsim.config.rendering import render_base
from fedsim.config.schema import AttackConfig, Choice, Config, section_class

__all__ = [
    "AttackConfig",
    "Choice",
    "Config",
    "build",
    "config_directory",
    "find",
    "load_config",
    "merge",
    "render_base",
    "section_class",
    "shipped",
    "type_name",
]
