"""What all benches share: timing in turn, ratios with their spread, head geometries, and the machine's roofs."""

from __future__ import annotations

import contextlib
import statistics
import time
from typing import NamedTuple

from . import _native
from .recipes import get_recipe

SETTLE_S = 0.003  # after another library's threads ran: they spin for about that long and would steal our cores
SLICE_S = 0.02  # one arm runs about this long in a round
BANDWIDTH_BYTES = 256 << 20  # larger than last-level caches: memory itself is read


class Geometry(NamedTuple):
    """The heads of one attention layer."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads


GEOMETRIES = {
    geometry.name: geometry
    for geometry in (
        Geometry("qwen", 12, 2, 128),  # Qwen2.5-1.5B
        Geometry("gemma", 4, 1, 256),  # Gemma-3-1B
        Geometry("smollm2", 9, 3, 64),  # SmolLM2-135M
        Geometry("llama8b", 32, 8, 128),  # Llama-3-8B
    )
}


def named_geometries(names: str) -> list[Geometry]:
    """ "qwen,gemma" as geometries; ValueError with those there are."""
    for name in names.split(","):
        if name not in GEOMETRIES:
            raise ValueError(f"geometry: got {name!r}; takes some of {', '.join(GEOMETRIES)}, with commas between")
    return [GEOMETRIES[name] for name in names.split(",")]


def own_geometry(heads: int | None, kv_heads: int | None, head_dim: int | None) -> Geometry:
    """A geometry by numbers; those left out are qwen's."""
    chosen = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    own = GEOMETRIES["qwen"]._replace(name="own", **{key: n for key, n in chosen.items() if n is not None})
    if own.kv_heads < 1 or own.heads < 1 or own.heads % own.kv_heads:
        raise ValueError(f"heads: got {own.heads}; takes a multiple of kv_heads ({own.kv_heads})")
    return own


def uncalibrated(recipe, command: str):
    """A recipe that needs nothing but the data; ValueError otherwise."""
    recipe = get_recipe(recipe)
    if recipe.lambda_:
        raise ValueError(f"recipe: one with lambda needs a calibration; {command} takes the others")
    return recipe


@contextlib.contextmanager
def restored():
    """Threads, ours and PyTorch's, and the backend are afterwards what they were before."""
    import torch

    before = torch.get_num_threads(), _native.num_threads(), _native.backend()
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        _native.set_num_threads(before[1])
        _native.set_backend(before[2])


def use_threads(n_threads: int) -> None:
    import torch

    torch.set_num_threads(n_threads)
    _native.set_num_threads(n_threads)


def time_alternately(arms: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds a call of each arm in each round; a round runs every arm for about SLICE_S, one after the other."""
    repeats = {}
    for name, call in arms.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, int(SLICE_S / max(time.perf_counter() - start, 1e-7)))
    seconds = {name: [] for name in arms}
    for _ in range(rounds):
        for name, call in arms.items():
            time.sleep(SETTLE_S)
            if repeats[name] > 1:
                call()  # brings its data back into the caches; a long call does that by itself
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    return seconds


def quartiles(values: list[float]) -> list[float]:
    """[lower, upper] quartile: half of the values lie between."""
    if len(values) < 2:
        return [values[0], values[0]]
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return [lower, upper]


def ratio(seconds: dict[str, list[float]], over: str, under: str) -> dict:
    """{"over_over_under": median of the rounds' ratios, "…_spread": their quartiles}."""
    each = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
    name = f"{over}_over_{under}"
    return {name: statistics.median(each), f"{name}_spread": quartiles(each)}


def roofs(n_threads: int) -> dict:
    """What the machine can do at most with so many threads and the backend in use."""
    return {
        "read_gb_per_s": _native.read_bandwidth(BANDWIDTH_BYTES, n_threads, 5),
        "dot_gops": _native.dot_peak(n_threads),
        "fma_gflops": _native.fma_peak(n_threads),
    }
