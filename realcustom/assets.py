"""Paths of the files shipped with the package: the embedded model and the example images.

A checkout has them in `assets/`, an installed wheel in `realcustom/_assets/`.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parent / "assets"
_ASSETS = _CHECKOUT if (_CHECKOUT / "mini").is_dir() else _PACKAGE / "_assets"

MINI_MODEL = _ASSETS / "mini"
"""The embedded model, a diffusers folder for `RealCustomPipeline.from_pretrained`."""

EXAMPLE_IMAGES = _ASSETS / "examples"
"""Reference images, such as `EXAMPLE_IMAGES / "dog.png"`."""
