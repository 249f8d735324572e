"""Predicts times on Apple GPUs from public figures: for readers who want to know what to expect before anyone ran it.

Nothing here was measured on Apple hardware. docs/metal.md says where each figure comes from and how far the model is
from the source paper's own measurements on an M1, which are the only check there is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from .bench import GEOMETRIES
from .recipes import bits_per_value, get_recipe

LANES = 128  # float32 operations a GPU core starts in a cycle; a fused multiply-add is one
THREADGROUP_BYTES_PER_CYCLE = 64  # of a core
SHUFFLE_BYTES_PER_CYCLE = 256  # of a core
CORE_THREADGROUP_BYTES = 60 << 10
CORE_REGISTER_BYTES = 208 << 10
CORE_THREADS = 3072
REGISTERS = 64  # 32-bit ones a thread where a kernel does not say, assumed: only the compiler knows
STREAMED = 0.94  # share of the stated bandwidth that a stream gets: clpeak reads 386 of the M3 Max's 409.6 GB/s


class Chip(NamedTuple):
    """An Apple GPU in its largest configuration."""

    name: str
    cores: int
    ghz: float
    gb_per_s: float

    @property
    def gops(self) -> float:
        return self.cores * self.ghz * LANES


CHIPS = (
    Chip("M1", 8, 1.278, 68.25),
    Chip("M1 Pro", 16, 1.296, 204.8),
    Chip("M1 Max", 32, 1.296, 409.6),
    Chip("M2", 10, 1.398, 102.4),
    Chip("M2 Pro", 19, 1.398, 204.8),
    Chip("M2 Max", 38, 1.398, 409.6),
    Chip("M3", 10, 1.398, 102.4),
    Chip("M3 Pro", 18, 1.398, 153.6),
    Chip("M3 Max", 40, 1.398, 409.6),
    Chip("M4", 10, 1.578, 120.0),
    Chip("M4 Pro", 20, 1.578, 273.0),
    Chip("M4 Max", 40, 1.678, 546.0),
)


class Work(NamedTuple):
    """What one unit of a kernel (a vector, or a token of a KV head) moves and computes, and how it is launched."""

    device_bytes: float
    threadgroup_bytes: float
    operations: float
    shuffle_bytes: float = 0.0
    threads: int = 128  # of a threadgroup
    threadgroup_memory: int = 0  # bytes
    registers: int = REGISTERS

    def limits_ns(self, chip: Chip) -> dict[str, float]:
        """Nanoseconds that each part of the chip needs for it when nothing else holds that part up."""
        cycles = chip.cores * chip.ghz
        return {
            "memory": self.device_bytes / (chip.gb_per_s * STREAMED),
            "threadgroup": self.threadgroup_bytes / (cycles * THREADGROUP_BYTES_PER_CYCLE),
            "arithmetic": self.operations / chip.gops,
            "shuffle": self.shuffle_bytes / (cycles * SHUFFLE_BYTES_PER_CYCLE),
        }

    def ns(self, chip: Chip) -> tuple[float, float]:
        """(all parts at the same time, one part after the other): the truth should lie between, nearer the second."""
        limits = self.limits_ns(chip).values()
        return max(limits), sum(limits)

    @property
    def threads_per_core(self) -> int:
        """Threads that a core can hold of it, as far as that can be known without the compiler."""
        room = CORE_REGISTER_BYTES // (4 * self.registers * self.threads)
        if self.threadgroup_memory:
            room = min(room, CORE_THREADGROUP_BYTES // self.threadgroup_memory)
        return min(room, CORE_THREADS // self.threads) * self.threads


# ------------------------------------------------------------------------------------------------------------- kernels


def _passes(n: int) -> list[int]:
    """The radices of a Fourier transform of length n: twos, then what is left."""
    radices = []
    while n % 2 == 0:
        n, radices = n // 2, [*radices, 2]
    return radices if n == 1 else [*radices, n]


def _transform(d: int) -> tuple[float, float]:
    """(threadgroup bytes, operations) of a real transform of d channels as a complex one of d/2 and an unpacking."""
    radices = _passes(d // 2)
    moved = 4 * d * (1 + 2 * len(radices) + 3)  # written once, read and written by each pass, unpacked from two places
    butterflies = sum(d / 2 / r * (10 if r == 2 else 8 * r * r) for r in radices)
    return moved, butterflies + 6 * d


def paper_encode(d: int, bits: int, groups: int, lambda_: bool) -> Work:
    """The source paper's encoding kernel: float32 in, codes and float32 scales out, one vector a threadgroup of 128."""
    moved, operations = _transform(d)
    return Work(
        device_bytes=4 * d + d * bits / 8 + 4 * groups,
        threadgroup_bytes=moved + 4 * d,
        operations=operations + d * (1 + 2 + 4 + lambda_),
        shuffle_bytes=4 * d * 5,
        threadgroup_memory=8 * d,
    )


# Real operations of a butterfly, its twiddles included, in src/gpu/rotate.h.
RADIX_OPERATIONS = {2: 10, 3: 28, 4: 34, 5: 64, 8: 106}


def _own_passes(n: int) -> list[int]:
    """The radices that src/gpu/rotate.h takes for a transform of length n, as its radix_of."""
    radices = []
    while n > 1:
        radix = next(r for r in (8, 4, 2, 3, 5) if n % r == 0)
        n, radices = n // radix, [*radices, radix]
    return radices


def encode(d: int, recipe, element_bytes: int = 2) -> Work:
    """Packing one K vector as src/gpu/encode.h: 16 channels a lane, codes and the search for scales in registers."""
    radices = _own_passes(d // 2)
    lanes = 2 ** math.ceil(math.log2(max(d / 16, 2)))
    group = recipe.k_group or d
    steps = math.log2(min(group / 16, lanes)) if group > 16 else 0
    tried = 6 if recipe.search else 0
    transform = sum(d / 2 / r * RADIX_OPERATIONS[r] for r in radices) + 6 * d
    return Work(
        device_bytes=element_bytes * d + d * recipe.k_bits / 8 + math.ceil(d / group) * recipe.scale_bits / 8,
        threadgroup_bytes=4 * d * (1 + 2 * len(radices) + 2 + 1),
        operations=transform + d * (2 + recipe.offset + recipe.lambda_ + 4 + 6 * tried + 4),
        shuffle_bytes=4 * lanes * (steps * (2 + tried) + 4),
        threadgroup_memory=4 * 4 * 512,
    )


def attend(geometry, recipe) -> Work:
    """One token of one KV head for one new query token, as src/gpu/attend_packed.h.

    A simdgroup has 4 or 8 rows (query heads). Each code is unpacked once for them: shift, mask, exponent, zero and
    scale; its products follow, those with rows that are not there included. Scores are summed over the lanes that share
    a token, halving what is left; weights go to all lanes one by one. The softmax is taken as 20 operations a row.
    """
    d = geometry.head_dim
    spans = math.ceil(d / 32)
    rows = 8 if spans <= 4 and geometry.group > 4 else 4
    times = math.ceil(geometry.group / rows)  # that codes are unpacked
    lanes = 16 if spans <= 2 else 32  # that share a token's K, four neighbouring channels each
    quads = math.ceil(8 * spans / lanes)
    channels = 4 * lanes * quads + 32 * spans  # of K and V, with lanes that have none
    sums = (lanes - 1) * rows  # additions and shuffles, each of one lane
    rescaled = rows * 32 * spans / 16
    turned = d * rows / recipe.offset_span if recipe.offset and recipe.offset_span else 0  # d / 2 pairs, two products
    broadcast = 32 * rows * (1 + 1 / 16) + 2 * math.log2(32 / rows)  # weights, factors of a block, and its maxima
    return Work(
        device_bytes=2 * d * bits_per_value(recipe, d) / 8,
        threadgroup_bytes=4 * turned * times,
        operations=times * ((5 + rows) * channels + sums + rescaled + turned + 20 * rows),
        shuffle_bytes=4 * times * (sums + broadcast),
        threads=128,
        threadgroup_memory=4 * 8 * (2 * d + 32 * spans + 2),
        registers=rows * (4 * quads + spans) + 40,  # queries, sums of values, and whatever else there is
    )


def attend_fp16(geometry) -> Work:
    """The same from K and V in fp16, at best: values are read once, and only products and softmax are counted."""
    d, group = geometry.head_dim, geometry.group
    return Work(device_bytes=4 * d, threadgroup_bytes=0, operations=group * (2 * d + 20))


# ----------------------------------------------------------------------------------------------- beside the paper's own

# (channels, bits, groups, lambda) -> ns a vector, measured by the paper's author on an M1 of 8 GPU cores.
PAPER_ENCODE = {
    (64, 8, 1, False): 13.0,
    (64, 4, 1, False): 13.5,
    (128, 8, 1, False): 19.5,
    (128, 4, 1, False): 20.1,
    (128, 4, 4, False): 22.0,
    (128, 4, 4, True): 24.6,
    (256, 4, 8, True): 50.0,
}
# {model: {prefix: (fp16 ms a token, int4 ms a token)}}, the same author's generate() on the same machine; none: failed.
PAPER_GENERATE = {
    "Qwen2.5-1.5B": {256: (90.7, 88.3), 1024: (137.1, 134.9), 2048: (377.6, None)},
    "Gemma-3-1B": {256: (71.2, 65.4), 1024: (83.3, 82.5), 2048: (129.5, 121.3), 4096: (188.5, 182.4)},
}


class Model(NamedTuple):
    """What generate() reads for a token: its weights once, and the cache of every layer."""

    geometry: str
    weight_bytes: float
    full_layers: int
    sliding_layers: int = 0
    window: int = 0

    def tokens(self, prefix: int) -> int:
        """Tokens attended to, summed over layers."""
        return self.full_layers * prefix + self.sliding_layers * min(prefix, self.window)


MODELS = {
    "Qwen2.5-1.5B": Model("qwen", 2 * 1.544e9, 28),
    "Gemma-3-1B": Model("gemma", 2 * 1.0e9, 4, 22, 512),
}


def table(rows: list[dict], unit: str) -> list[dict]:
    """Predicted rows for people: the chips of interest, and on the M1 the part that takes longest."""
    shown = []
    for row in rows:
        first = next(key for key in row if isinstance(row[key], str))
        limits = row["limits_ns"]["M1"]
        cut = {first: row[first], f"M1 {unit}": row["M1"], "paper, M1": row.get("paper_m1_ns")}
        cut |= {f"{name} {unit}": row[name] for name in ("M1 Max", "M2 Max", "M3 Max", "M4", "M4 Max")}
        shown.append(
            cut | {"slowest part on M1": max(limits, key=limits.get), "threads a core": row["threads_per_core"]}
        )
    return shown


def predict_encode(recipe="default") -> list[dict]:
    """Rows: ns a vector of the paper's kernels and of ours, from a bound to one part after the other, on each chip."""
    kernels = {
        f"paper d{d} int{bits}{' g32' if groups > 1 else ''}{' λ' if lambda_ else ''}": (
            paper_encode(d, bits, groups, lambda_),
            measured,
        )
        for (d, bits, groups, lambda_), measured in PAPER_ENCODE.items()
    }
    kernels |= {f"ours d{d} {recipe}": (encode(d, get_recipe(recipe)), None) for d in (64, 80, 96, 128, 256)}
    rows = []
    for name, (work, measured) in kernels.items():
        row = {"kernel": name, "bytes": work.device_bytes, "threadgroup_bytes": work.threadgroup_bytes}
        row |= {"operations": work.operations, "threads_per_core": work.threads_per_core}
        row |= {chip.name: work.ns(chip)[1] for chip in CHIPS} | {"paper_m1_ns": measured}
        rows.append(row | {"limits_ns": {chip.name: work.limits_ns(chip) for chip in CHIPS}})
    return rows


def predict_attend(recipe="default") -> list[dict]:
    """Rows: nanoseconds a token of a KV head for one new token, on each chip, for each geometry, packed and in fp16."""
    rows = []
    for geometry in GEOMETRIES.values():
        kinds = {f"{geometry.name} packed": attend(geometry, get_recipe(recipe))}
        kinds[f"{geometry.name} fp16, at best"] = attend_fp16(geometry)
        for name, work in kinds.items():
            row = {"geometry": name, "bytes": work.device_bytes, "operations": work.operations}
            row |= {"threads_per_core": work.threads_per_core}
            row |= {chip.name: work.ns(chip)[1] for chip in CHIPS}
            rows.append(row | {"limits_ns": {chip.name: work.limits_ns(chip) for chip in CHIPS}})
    return rows


def predict_generate(recipe="default") -> list[dict]:
    """Rows: ms a token, one a model, prefix and chip.

    fp16_floor_ms and int4_floor_ms: weights and cache read once at the chip's bandwidth, and nothing else.
    attention_ms: packed attention of all layers, by the model of its kernel. On the M1 the source paper's two
    measurements stand beside them; what else eager PyTorch does in a token is not modelled.
    """
    recipe, rows = get_recipe(recipe), []
    for name, model in MODELS.items():
        geometry = GEOMETRIES[model.geometry]
        work = attend(geometry, recipe)
        for prefix in PAPER_GENERATE[name]:
            heads = model.tokens(prefix) * geometry.kv_heads
            for chip in CHIPS:
                ms_per_byte = 1e-6 / (chip.gb_per_s * STREAMED)
                cached = {"fp16": 4 * geometry.head_dim, "int4": work.device_bytes}
                floors = {f"{k}_floor_ms": (model.weight_bytes + n * heads) * ms_per_byte for k, n in cached.items()}
                measured = PAPER_GENERATE[name][prefix] if chip.name == "M1" else (None, None)
                rows.append(
                    {"model": name, "prefix": prefix, "chip": chip.name}
                    | floors
                    | {"attention_ms": work.ns(chip)[1] * heads * 1e-6}
                    | {"paper_fp16_ms": measured[0], "paper_int4_ms": measured[1]}
                )
    return rows
