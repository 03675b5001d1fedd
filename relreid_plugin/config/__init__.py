"""Configurations: the keys with their defaults, ranges and combinations, merged from YAML files and the command line."""

from .defaults import get_default_config, load_config

__all__ = ["get_default_config", "load_config"]
