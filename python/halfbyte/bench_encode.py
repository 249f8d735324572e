"""Times packing alone, with several recipes in turn."""

from __future__ import annotations

import statistics

from . import _native
from .bench import quartiles
from .recipes import get_recipe


def encode_recipes() -> dict:
    """What packing costs, ingredient by ingredient."""
    return {
        "default": get_recipe("default"),
        "srht": get_recipe("default", rotation="srht"),
        "identity": get_recipe("default", rotation="identity"),
        "no-search": get_recipe("default", search=False),
        "srht-no-search": get_recipe("default", rotation="srht", search=False),
        **{name: get_recipe(name) for name in ("paper-per-token", "paper-g32", "g16", "k8v4")},
    }


def bench_encode(head_dim=128, vectors=262144, backends=(), rounds=5, seed=0) -> list[dict]:
    """Rows {backend, head_dim, recipe, ns_per_vector, ns_per_vector_spread, over_no_search, over_no_search_spread}.

    Packing random vectors as K on one thread, recipes in turn; medians over rounds, spreads are quartiles.
    over_no_search: the median of the rounds' ratios to the recipe `no-search`.
    """
    import numpy as np

    if vectors < 1:
        raise ValueError(f"vectors: got {vectors}; takes at least 1")
    x = np.random.default_rng(seed).standard_normal((vectors, head_dim), dtype=np.float32)
    recipes = encode_recipes()
    if head_dim & (head_dim - 1):  # SRHT exists for powers of two only
        recipes = {name: recipe for name, recipe in recipes.items() if recipe.rotation != "srht"}
    rows, before = [], _native.backend()
    try:
        for backend in backends or [before]:
            _native.set_backend(backend)
            rows += _encode_rows(x, recipes, rounds)
    finally:
        _native.set_backend(before)
    return rows


def _encode_rows(x, recipes, rounds):
    vectors, head_dim = x.shape
    ns = {name: [] for name in recipes}
    for each_round in range(rounds + 1):
        for name, recipe in recipes.items():
            took = _native.encode_bench(x.ctypes.data, vectors, head_dim, recipe, 1) * 1e9 / vectors
            if each_round:  # round 0 warms up
                ns[name].append(took)
    rows = []
    for name, times in ns.items():
        over = [a / b for a, b in zip(times, ns["no-search"], strict=True)]
        row = {"backend": _native.backend(), "head_dim": head_dim, "recipe": name}
        row |= {"ns_per_vector": statistics.median(times), "ns_per_vector_spread": quartiles(times)}
        row |= {"over_no_search": statistics.median(over), "over_no_search_spread": quartiles(over)}
        rows.append(row | {"rounds": {"ns": times}})
    return rows
