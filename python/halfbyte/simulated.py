"""Recipes of ours that have no kernels yet, by name: other bits, a table of uneven levels, offsets of every token."""

from __future__ import annotations

from collections.abc import Callable

from transformers import LlamaConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from .auto import head_size
from .codecs import OFFSET_TOKENS, Codec, Linear, Packed, Side, Sinks, Table, Turning
from .peers import PEERS
from .recipes import RECIPES, bits_per_value
from .rope import layer_rope

# Sixteen levels of least squared error for normal groups of 32 whose extreme lands on -127, as tools/train_table.py
# finds them; whole numbers, so that a byte lookup can hold them.
LEVELS = tuple(x / 127 for x in (-127, -100, -80, -64, -49, -36, -24, -12, 0, 12, 24, 37, 51, 67, 86, 110))

SPAN = RECIPES["default"].offset_span


def turning(config, span: int, tokens: int = OFFSET_TOKENS, given=None) -> Turning:
    """The offset of keys that turns with a model's RoPE; it does not where a layer has none, or one of unknown kind."""
    head_dim = head_size(config)
    kinds, _ = get_layer_types_and_kwargs(config)
    return Turning([layer_rope(config, i, kind, head_dim) for i, kind in enumerate(kinds)], tokens, span, given)


def packed(recipe, config, calibration=None, tokens: int = OFFSET_TOKENS) -> Packed:
    """The Packed of a recipe for a model's config: as Int4Cache has it, given offsets turn if they were made to."""
    given = getattr(calibration, "offset_k", None) or None
    turns = recipe.offset and recipe.offset_span and (given is None or calibration.turns)
    return Packed(recipe, calibration, tokens, turning(config, recipe.offset_span, tokens, given) if turns else None)


def _simulated(k, v, span: int = SPAN):
    """K's offset turns every `span` tokens."""
    return lambda config: Codec(Side(k, offset=turning(config, span)), Side(v))


def _bits(k: int, v: int):
    return _simulated(Linear(k, 32), Linear(v, 32))


def _table(k_group: int, v_group: int, span: int = SPAN):
    return _simulated(Table(LEVELS, k_group), Table(LEVELS, v_group), span)


def _sinks(make):
    return lambda config: Sinks(make(config))


def listing(head_dim: int) -> list[dict]:
    """Every recipe and codec: {recipe, bits a value with heads of `head_dim`, runs: in kernels or simulated}."""
    config = LlamaConfig(head_dim=head_dim, num_hidden_layers=1)
    bits = {name: bits_per_value(recipe, head_dim) for name, recipe in RECIPES.items()}
    rows = [{"recipe": name, "bits": value, "runs": "kernels"} for name, value in bits.items()]
    codecs = {name: make(config) for name, make in SIMULATED.items()} | PEERS
    for name, codec in codecs.items():
        runs = "simulated, by eval alone" if name in SIMULATED else "a codec of others, simulated, by eval alone"
        rows.append({"recipe": name, "bits": codec.bits_per_value(head_dim), "runs": runs})
    return rows


_OURS: dict[str, Callable] = {
    "k2v2": _bits(2, 2),
    "k3v3": _bits(3, 3),
    "k4v2": _bits(4, 2),
    "k4v3": _bits(4, 3),
    "k6v6": _bits(6, 6),
    "table": _table(32, 0),
    "table-g32": _table(32, 32),
    "vector-table": _table(0, 0),
    "turning-token": _simulated(Linear(4, 32), Linear(4, 0), 1),
    "turning-table": _table(32, 0, 16),
    "turning-table-g32": _table(32, 32, 16),
    "turning-vector-table": _table(0, 0, 16),
}

# A codec for a model's config (of its decoder). Ours keep the first tokens raw, as the default does; of the codecs of
# others the two that come closest are here with those tokens raw as well.
SIMULATED: dict[str, Callable] = {name: _sinks(make) for name, make in _OURS.items()} | {
    "kivi-4-g64-sinks": _sinks(lambda config: PEERS["kivi-4-g64"]),
    "kvarn-4-sinks": _sinks(lambda config: PEERS["kvarn-4"]),
}
