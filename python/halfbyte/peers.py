"""Other KV cache codecs, from their public descriptions, in the same harness as ours: what they lose at which size.

Each packs every token: windows of recent tokens that some of them keep in fp16 are left out for all, and counted for
none. Bits a value count codes, scales and zero points as the original keeps them. Nothing here is anyone's code.
"""

from __future__ import annotations

import dataclasses
import math
from functools import lru_cache

import torch

from .codecs import Codec, Linear, Side, Table, both, group_size, join_groups, nearest, split_groups, stored

# Levels of 4-bit floating point with 2 exponent bits and 1 of mantissa.
E2M1 = tuple(sorted({sign * level / 6 for sign in (1, -1) for level in (0, 0.5, 1, 1.5, 2, 3, 4, 6)}))
# The uneven table of llama.cpp's 4-bit non-linear type, over 127.
IQ4_NL = tuple(x / 127 for x in (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))


@dataclasses.dataclass(frozen=True)
class Affine:
    """Codes between the minimum and the maximum of a group, which lies along the channels or along the tokens."""

    bits: int = 4
    group: int = 64
    along: str = "channels"
    parameter_bits: int = 32  # scale and zero point, fp16 both

    def bits_per_value(self, head_dim: int) -> float:
        size = group_size(self.group, head_dim) if self.along == "channels" else self.group
        return self.bits + self.parameter_bits / size

    def __call__(self, y: torch.Tensor) -> torch.Tensor:
        if self.along == "channels":
            return join_groups(self._code(split_groups(y, self.group)), y.shape[-1])
        # The last tokens fill no group of their own: repeat the last one, whose range is theirs already.
        columns = y.mT
        short = -y.shape[1] % self.group
        filled = torch.cat([columns, columns[..., -1:].expand(*columns.shape[:-1], short)], -1)
        groups = filled.unflatten(-1, (-1, self.group))
        return self._code(groups).flatten(-2)[..., : y.shape[1]].mT

    def _code(self, groups):
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = stored(((high - low) / (2**self.bits - 1)).clamp_min(1e-7), 16)
        low = stored(low, 16)
        return ((groups - low) / scale).round().clamp(0, 2**self.bits - 1) * scale + low


@dataclasses.dataclass(frozen=True)
class HalfQuadratic(Affine):
    """Affine codes whose zero point is moved by half-quadratic steps on an l_0.7 error, as HQQ describes."""

    steps: int = 20

    def _code(self, groups):
        power, beta = 0.7, 10.0
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = stored(((high - low) / (2**self.bits - 1)).clamp_min(1e-7), 16)
        zero = -low / scale
        for _ in range(self.steps):
            codes = (groups / scale + zero).round().clamp(0, 2**self.bits - 1)
            error = groups - (codes - zero) * scale
            magnitude = error.abs().clamp_min(1e-12)
            kept = error.sign() * (magnitude - magnitude.pow(power - 1) / beta).clamp_min(0)
            zero = (codes - (groups - kept) / scale).mean(-1, keepdim=True)
            beta *= 1.01
        zero = stored(zero, 16)
        return ((groups / scale + zero).round().clamp(0, 2**self.bits - 1) - zero) * scale


@lru_cache
def gaussian_levels(bits: int) -> tuple[float, ...]:
    """The 2^bits levels of least squared error for a standard normal variable (Lloyd 1957, Max 1960)."""
    levels = torch.linspace(-2.5, 2.5, 2**bits, dtype=torch.float64)
    infinity = torch.tensor([math.inf], dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, 1.0)
    for _ in range(2000):
        edges = torch.cat([-infinity, (levels[1:] + levels[:-1]) / 2, infinity])
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        levels = (density[:-1] - density[1:]) / (normal.cdf(edges[1:]) - normal.cdf(edges[:-1]))
    return tuple(levels.tolist())


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """A vector's norm in fp16, and every channel on the levels that are best for a normal variable: TurboQuant's."""

    bits: int = 4

    def bits_per_value(self, head_dim: int) -> float:
        return self.bits + 16 / head_dim

    def __call__(self, y: torch.Tensor) -> torch.Tensor:
        scale = stored(y.norm(dim=-1, keepdim=True), 16).clamp_min(1e-7) / y.shape[-1] ** 0.5
        return nearest(y / scale, torch.tensor(gaussian_levels(self.bits))) * scale


@dataclasses.dataclass(frozen=True)
class RowColumn:
    """Tiles of tokens scaled in turn by the deviation of their columns and of their rows, then affine codes: KVarN's.

    along: the axis a scale and zero point run along; the other axis keeps one more fp16 factor.
    """

    bits: int = 4
    tile: int = 128  # tokens
    along: str = "tokens"
    rounds: int = 16

    def bits_per_value(self, head_dim: int) -> float:
        own, other = (self.tile, head_dim) if self.along == "tokens" else (head_dim, self.tile)
        return self.bits + 32 / own + 16 / other

    def __call__(self, y: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._tile(tile) for tile in y.split(self.tile, 1)], 1)

    def _tile(self, y):
        rows, columns = torch.ones_like(y[..., :1]), torch.ones_like(y[:, :1])
        for _ in range(self.rounds if y.shape[1] > 1 else 0):
            columns = columns * self._spread(y / rows / columns, 1)
            rows = rows * self._spread(y / rows / columns, -1)
        rows, columns = stored(rows, 16), stored(columns, 16)
        size = y.shape[1] if self.along == "tokens" else 0
        return Affine(self.bits, size, self.along)(y / rows / columns) * rows * columns

    @staticmethod
    def _spread(y, dim):
        # Over its geometric mean: a constant far from zero keeps the two axes from ever agreeing, and factors grew.
        logs = y.std(dim, keepdim=True).clamp_min(1e-6).log()
        return (logs - logs.mean((-2, -1), keepdim=True)).clamp(-2, 2).exp()


@dataclasses.dataclass(frozen=True)
class Float8:
    """e4m3 as it is, without a scale."""

    def bits_per_value(self, head_dim: int) -> float:
        return 8.0

    def __call__(self, y: torch.Tensor) -> torch.Tensor:
        return y.clamp(-448, 448).to(torch.float8_e4m3fn).float()


@dataclasses.dataclass(frozen=True)
class MicroFloat:
    """4-bit floats in blocks: NVFP4 (16, an e4m3 scale) and MXFP4 (32, a power of two)."""

    group: int = 16

    def bits_per_value(self, head_dim: int) -> float:
        return 4 + 8 / self.group

    def __call__(self, y: torch.Tensor) -> torch.Tensor:
        groups = split_groups(y, self.group)
        largest = groups.abs().amax(-1, keepdim=True).clamp_min(1e-6)
        if self.group == 16:
            scale = (largest / 6).clamp(2**-9, 448).to(torch.float8_e4m3fn).float()
        else:
            scale = torch.exp2(largest.log2().floor() - 2)
        return join_groups(nearest(groups / scale / 6, torch.tensor(E2M1)) * 6 * scale, y.shape[-1])


def _plain(k, v=None) -> Codec:
    """No offset and no rotation."""
    return Codec(Side(k, "identity", offset=0), Side(v or k, "identity", offset=0))


def _kivi(bits: int, group: int) -> Codec:
    return _plain(Affine(bits, group, "tokens"), Affine(bits, group))


_Q4_0 = Linear(4, 32, search=False)
_Q8_0 = Linear(8, 32, search=False, signed_scale=False)

PEERS: dict[str, Codec] = {
    "quanto-int4": _plain(Affine(4, 64)),
    "quanto-int2": _plain(Affine(2, 64)),
    "hqq-int4": _plain(HalfQuadratic(4, 64)),
    "kivi-4-g32": _kivi(4, 32),
    "kivi-4-g64": _kivi(4, 64),
    "kivi-4-g128": _kivi(4, 128),
    "kivi-2-g32": _kivi(2, 32),
    "q4_0": _plain(_Q4_0),
    "q4_0-hadamard": both(_Q4_0, rotation="srht", offset=0),
    "q4_1": _plain(Affine(4, 32)),
    "iq4_nl": _plain(Table(IQ4_NL, 32)),
    "q5_0": _plain(Linear(5, 32, search=False)),
    "q8_0": _plain(_Q8_0),
    "turboquant-4": both(Gaussian(4), rotation="srht", offset=0),
    "turboquant-3": both(Gaussian(3), rotation="srht", offset=0),
    "kvarn-4": Codec(
        Side(RowColumn(4), rotation="srht", offset=0), Side(RowColumn(4, along="channels"), rotation="srht", offset=0)
    ),
    "nvfp4": _plain(MicroFloat(16)),
    "mxfp4": _plain(MicroFloat(32)),
    "fp8-e4m3": _plain(Float8()),
    "int8": _plain(Linear(8, 0, search=False, signed_scale=False)),
}
