"""Halfbyte: a KV cache in four bits, with attention computed on the packed codes.

``from halfbyte import Int4Cache, Int4StaticCache`` is the interface for transformers users; it is loaded when first
asked for, so that importing the package alone needs no PyTorch.
"""

from halfbyte._native import Recipe
from halfbyte._native import commit as __commit__
from halfbyte._native import version as __version__
from halfbyte.recipes import RECIPES, get_recipe

__all__ = ["RECIPES", "Int4Cache", "Int4StaticCache", "Recipe", "__commit__", "__version__", "get_recipe"]


def __getattr__(name: str):
    if name == "Int4Cache":
        from halfbyte.hf import Int4Cache

        return Int4Cache
    if name == "Int4StaticCache":
        from halfbyte.static import Int4StaticCache

        return Int4StaticCache
    raise AttributeError(f"module 'halfbyte' has no attribute {name!r}")
