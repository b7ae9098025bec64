"""The version, in its one place: pyproject.toml and the package read it here."""

__version__ = "0.1.0"
