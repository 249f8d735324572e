"""Halfbyte: a KV cache in four bits, with attention computed on the packed codes.

``from halfbyte import Int4Cache, Int4StaticCache`` is the interface for transformers users; it is loaded when first
asked for, so that importing the package alone needs no PyTorch.
"""

import importlib

from halfbyte._native import Recipe
from halfbyte._native import commit as __commit__
from halfbyte._native import version as __version__
from halfbyte.recipes import RECIPES, get_recipe

__all__ = ["RECIPES", "Int4Cache", "Int4StaticCache", "Recipe", "__commit__", "__version__", "get_recipe"]


def __getattr__(name: str):
    module = {"Int4Cache": "hf", "Int4StaticCache": "static"}.get(name)
    if module is None:
        raise AttributeError(f"module 'halfbyte' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"halfbyte.{module}"), name)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers", "safetensors"):
            raise
        raise ModuleNotFoundError(
            f"halfbyte.{name} needs {error.name}: pip install 'halfbyte[hf]'", name=error.name
        ) from error
