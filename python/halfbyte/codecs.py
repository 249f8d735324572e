"""Codecs as functions from K or V to what a cache would give back: for recipes without kernels, and for comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from . import _native
from .recipes import Recipe, bits_per_value, get_recipe

SEARCH_SIGNED = (1.0, 1.1, 1.05, 0.95, 0.9, 0.85)  # docs/format.md
SEARCH = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
OFFSET_TOKENS = 256


def group_size(group: int, head_dim: int) -> int:
    """Channels a scale stands for; 0 means all."""
    return head_dim if group == 0 else min(group, head_dim)


def split_groups(y: torch.Tensor, group: int) -> torch.Tensor:
    """[..., head_dim] as [..., groups, channels of a group], zeros added to fill the last one."""
    group = group_size(group, y.shape[-1])
    return torch.nn.functional.pad(y, (0, -y.shape[-1] % group)).unflatten(-1, (-1, group))


def join_groups(groups: torch.Tensor, head_dim: int) -> torch.Tensor:
    """What split_groups took apart."""
    return groups.flatten(-2)[..., :head_dim]


def stored(scale: torch.Tensor, bits: int) -> torch.Tensor:
    """A scale rounded to how it is kept: fp16 or fp32."""
    return scale.half().float() if bits == 16 else scale


def least_error(y: torch.Tensor, scales, quantise) -> torch.Tensor:
    """y [..., groups, channels] coded with that of `scales` ([..., groups, 1] each) that gives the least squared error.

    quantise(y, scale) gives the decoded values. The first of equals wins.
    """
    best = least = None
    for scale in scales:
        decoded = quantise(y, scale)
        error = (y - decoded).square().sum(-1, keepdim=True)
        if best is None:
            best, least = decoded, error
        else:
            better = error < least
            best, least = torch.where(better, decoded, best), torch.minimum(error, least)
    return best


def extreme(y: torch.Tensor) -> torch.Tensor:
    """The value of largest magnitude of each group, with its sign, [..., groups, 1]; the positive one of equals."""
    low, high = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
    return torch.where(high >= -low, high, low)


@dataclasses.dataclass(frozen=True)
class Linear:
    """The quantiser of docs/format.md, at any number of bits."""

    bits: int = 4
    group: int = 32  # 0: the whole head
    search: bool = True
    signed_scale: bool = True
    scale_bits: int = 16

    def bits_per_value(self, head_dim: int) -> float:
        return self.bits + self.scale_bits / group_size(self.group, head_dim)

    def __call__(self, y: torch.Tensor) -> torch.Tensor:
        half = 2 ** (self.bits - 1)
        low = -half if self.signed_scale or self.search else 1 - half

        def quantise(groups, scale):
            safe = torch.where(scale == 0, 1.0, scale)
            return (groups / safe).round().clamp(low, half - 1) * scale

        groups = split_groups(y, self.group)
        largest = extreme(groups)
        covering = -largest / half if self.signed_scale else largest.abs() / max(half - 1, 1)
        factors = SEARCH_SIGNED if self.signed_scale else SEARCH
        scales = [stored(covering * factor, self.scale_bits) for factor in (factors if self.search else factors[:1])]
        return join_groups(least_error(groups, scales, quantise), y.shape[-1])


@dataclasses.dataclass(frozen=True)
class Table:
    """Uneven levels times a scale a group: what a lookup in a small table would decode.

    levels ascend, the largest magnitude is 1. The scale puts the group's extreme on that level, times a factor.
    """

    levels: tuple[float, ...]
    group: int = 32
    factors: tuple[float, ...] = SEARCH_SIGNED
    scale_bits: int = 16

    def bits_per_value(self, head_dim: int) -> float:
        return (len(self.levels) - 1).bit_length() + self.scale_bits / group_size(self.group, head_dim)

    def __call__(self, y: torch.Tensor) -> torch.Tensor:
        levels = torch.tensor(self.levels)
        outermost = levels[levels.abs().argmax()]

        def quantise(groups, scale):
            return nearest(groups / torch.where(scale == 0, 1.0, scale), levels) * scale

        groups = split_groups(y, self.group)
        covering = extreme(groups) / outermost
        scales = [stored(covering * factor, self.scale_bits) for factor in self.factors]
        return join_groups(least_error(groups, scales, quantise), y.shape[-1])


def nearest(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The nearest of ascending `levels` to each x."""
    return levels[torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2)]


@dataclasses.dataclass(frozen=True)
class Turning:
    """An offset that turns with RoPE: the mean of the first `tokens` keys as before RoPE, turned to where a key stands.

    ropes: the Rope of each layer, None where keys do not turn. span: positions that share an offset, and count as the
    one in their middle, when the mean is taken too. given: such means from elsewhere, [heads, head_dim] a layer. A
    constant in the projection stays one vector before RoPE and becomes another at every position after it; a fixed
    offset fits only near the tokens it came from.
    """

    ropes: Sequence
    tokens: int = OFFSET_TOKENS
    span: int = 16
    given: Sequence | None = None

    def of(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        """float32 [heads, tokens, head_dim], for the keys x at positions 0, 1, ..."""
        mean = self.back(x[:, : self.tokens].float(), layer).mean(1) if self.given is None else self.given[layer]
        return self.forth(mean, layer, x.shape[1])

    def back(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        """x [heads, tokens, head_dim] at positions 0, 1, ... turned back: what the mean is taken of."""
        rope = self.ropes[layer]
        return x if rope is None else rope.turn(x, -self._middles(x.shape[1]))

    def forth(self, mean: torch.Tensor, layer: int, tokens: int) -> torch.Tensor:
        """The offsets [heads, tokens, head_dim] of so many tokens, from one mean [heads, head_dim]."""
        rope, mean = self.ropes[layer], mean[:, None].expand(-1, tokens, -1)
        return mean if rope is None else rope.turn(mean, self._middles(tokens))

    def _middles(self, tokens):
        return torch.arange(tokens) // self.span * self.span + (self.span - 1) // 2


@dataclasses.dataclass(frozen=True)
class Side:
    """What a codec does to K or to V.

    quantiser: y [heads, tokens, head_dim] -> the same, decoded; it has bits_per_value(head_dim). rotation: "identity",
    "srft", "srht" (with `seed`), or a pair of matrices a layer, [head_dim, head_dim] or one for each head: y = A x and
    its inverse. offset: how many first tokens' mean is taken off, 0 for none, or one tensor a layer
    [heads, head_dim], or a Turning. lambda_: factors after the rotation, one tensor a layer [heads, head_dim].
    """

    quantiser: Callable
    rotation: str | Sequence = "srft"
    seed: int = 0
    offset: int | Turning | Sequence = OFFSET_TOKENS
    lambda_: Sequence | None = None

    def apply(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        """x float32 [heads, tokens, head_dim] as it comes back out of the cache."""
        if isinstance(self.offset, int):
            mean = x[:, : self.offset].mean(1, keepdim=True) if self.offset else torch.zeros(())
        elif isinstance(self.offset, Turning):
            mean = self.offset.of(x, layer)
        else:
            mean = self.offset[layer][:, None]
        factors = 1.0 if self.lambda_ is None else self.lambda_[layer][:, None]
        y = self._rotate(x - mean, layer, False) * factors
        return self._rotate(self.quantiser(y) / factors, layer, True) + mean

    def _rotate(self, x, layer, inverse):
        if self.rotation == "identity":
            return x
        if isinstance(self.rotation, str):
            return rotate(x, Recipe(rotation=self.rotation, seed=self.seed), layer, inverse)
        return x @ self.rotation[layer][inverse].mT


@dataclasses.dataclass(frozen=True)
class Codec:
    """A pair of sides: codec(x, layer, which) with x [heads, tokens, head_dim] of one sequence."""

    k: Side
    v: Side

    def bits_per_value(self, head_dim: int) -> float:
        """Mean over K and V, scales and zero points included, offsets not: they are one vector a sequence."""
        return sum(side.quantiser.bits_per_value(head_dim) for side in (self.k, self.v)) / 2

    def __call__(self, x: torch.Tensor, layer: int, which: str) -> torch.Tensor:
        return getattr(self, which).apply(x.float(), layer).to(x.dtype)

    def with_seed(self, seed: int) -> Codec:
        """The same with the signs of a named rotation drawn anew."""
        sides = (dataclasses.replace(side, seed=seed) for side in (self.k, self.v))
        return Codec(*sides)


def both(quantiser, **fields) -> Codec:
    """A codec that does the same to K and V."""
    return Codec(Side(quantiser, **fields), Side(quantiser, **fields))


@dataclasses.dataclass(frozen=True)
class Packed:
    """A recipe through the library's own kernels: pack, unpack. turning: the offset of K, where it is not fixed."""

    recipe: Recipe
    calibration: object | None = None
    offset_tokens: int = OFFSET_TOKENS
    turning: Turning | None = None

    def bits_per_value(self, head_dim: int) -> float:
        return bits_per_value(self.recipe, head_dim)

    def __call__(self, x: torch.Tensor, layer: int, which: str) -> torch.Tensor:
        lambda_ = getattr(self.calibration, f"lambda_{which}")[layer] if self.recipe.lambda_ else None
        turning = self.turning if self.recipe.offset and which == "k" else None
        offset = self._offset(x, layer, which) if self.recipe.offset and turning is None else None
        dense = self.recipe.rotation == "dense"
        matrix = getattr(self.calibration, f"rotation_{which}")[layer] if dense else None
        taken_off = 0.0 if turning is None else turning.of(x, layer)
        packed = round_trip(x.float() - taken_off, self.recipe, which, layer, offset, lambda_, matrix) + taken_off
        return keep_first(packed.to(x.dtype), x, self.recipe.sink_tokens)

    def _offset(self, x, layer, which):
        given = getattr(self.calibration, f"offset_{which}", None)
        return given[layer] if given else x[:, : self.offset_tokens].float().mean(1).contiguous()

    def with_seed(self, seed: int) -> Packed:
        return dataclasses.replace(self, recipe=get_recipe(self.recipe, seed=seed))


def keep_first(packed: torch.Tensor, x: torch.Tensor, tokens: int) -> torch.Tensor:
    """packed [heads, tokens, head_dim] with its first tokens as they were in x."""
    return torch.cat([x[:, :tokens], packed[:, tokens:]], 1) if tokens else packed


@dataclasses.dataclass(frozen=True)
class Sinks:
    """Any codec with the first tokens kept raw: where a model parks attention it has no use for, errors cost most."""

    base: object
    tokens: int = 16

    def bits_per_value(self, head_dim: int) -> float:
        return self.base.bits_per_value(head_dim)  # of what is packed

    def __call__(self, x: torch.Tensor, layer: int, which: str) -> torch.Tensor:
        return keep_first(self.base(x, layer, which), x, self.tokens)

    def with_seed(self, seed: int) -> Sinks:
        return Sinks(self.base.with_seed(seed), self.tokens)


@dataclasses.dataclass(frozen=True)
class PerLayer:
    """One codec for some layers and another for the rest. overrides: {layer index: codec}; `layers`: of the model."""

    base: object
    overrides: dict
    layers: int

    def _of(self, layer: int):
        return self.overrides.get(layer, self.overrides.get(layer - self.layers, self.base))

    def bits_per_value(self, head_dim: int) -> float:
        return sum(self._of(layer).bits_per_value(head_dim) for layer in range(self.layers)) / self.layers

    def __call__(self, x: torch.Tensor, layer: int, which: str) -> torch.Tensor:
        return self._of(layer)(x, layer, which)

    def with_seed(self, seed: int) -> PerLayer:
        overrides = {layer: codec.with_seed(seed) for layer, codec in self.overrides.items()}
        return PerLayer(self.base.with_seed(seed), overrides, self.layers)


@dataclasses.dataclass(frozen=True)
class Only:
    """A codec for one side of one layer; everything else stays as it is."""

    base: object
    layer: int
    which: str

    def bits_per_value(self, head_dim: int) -> float:
        return self.base.bits_per_value(head_dim)  # of what is packed

    def __call__(self, x: torch.Tensor, layer: int, which: str) -> torch.Tensor:
        return self.base(x, layer, which) if (layer, which) == (self.layer, self.which) else x

    def with_seed(self, seed: int) -> Only:
        return dataclasses.replace(self, base=self.base.with_seed(seed))


def _in_cpu_memory(x):
    """x as float32, contiguous; ValueError for one on another device, whose address would mean nothing here."""
    if x.device.type != "cpu":
        raise ValueError(f"x: got a tensor on {x.device}, takes one in CPU memory: measure a model on the CPU")
    return x.float().contiguous()


def rotate(x: torch.Tensor, recipe, layer_index: int, inverse: bool = False) -> torch.Tensor:
    """R x (or its inverse) for float32 x [..., head_dim], with the recipe's rotation for this layer."""
    x = _in_cpu_memory(x)
    out = torch.empty_like(x)
    head_dim = x.shape[-1]
    _native.rotate(x.data_ptr(), out.data_ptr(), x.numel() // head_dim, head_dim, recipe, layer_index, inverse)
    return out


def round_trip(x: torch.Tensor, recipe, which: str, layer: int, offset=None, lambda_=None, matrix=None) -> torch.Tensor:
    """x [kv_heads, tokens, head_dim] packed and unpacked.

    offset, lambda_: float32 [kv_heads, head_dim] or None; matrix: R of a dense recipe, float32 [head_dim, head_dim].
    """
    source = _in_cpu_memory(x)
    out = torch.empty_like(source)
    heads, tokens, head_dim = source.shape
    if lambda_ is not None and lambda_.shape != (heads, head_dim):
        raise ValueError(
            f"calibration: layer {layer} has lambda_{which} of shape {list(lambda_.shape)}; this model "
            f"takes {[heads, head_dim]}"
        )
    address = 0 if matrix is None else matrix.data_ptr()
    for head in range(heads):
        mu, lam = (0 if t is None else t[head].data_ptr() for t in (offset, lambda_))
        _native.roundtrip(
            source[head].data_ptr(), out[head].data_ptr(), tokens, head_dim, recipe, which, mu, lam, layer, address
        )
    return out.to(x.dtype)
