"""The version of cgspn_seg: its only place, from which pyproject.toml and the package take it."""

__version__ = "0.1.0"
