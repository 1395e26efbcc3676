"""The version, apart from the package, so that what the package imports can read it too."""

__version__ = "0.1.0"
