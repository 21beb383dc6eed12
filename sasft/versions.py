"""What a result may hang on beside its settings."""

import platform
from importlib.metadata import version


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that compute.

    >>> sorted(versions())[:2]
    ['accelerate', 'numpy']
    """
    packages = ("torch", "transformers", "peft", "accelerate", "numpy")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}
