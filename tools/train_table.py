#!/usr/bin/env python3
"""Finds the sixteen levels that lose least on normal groups when the scale puts each group's extreme on the first.

Usage: python tools/train_table.py [--group 32]
"""

import argparse

import torch

from halfbyte.codecs import SEARCH_SIGNED, extreme


def train(group: int, vectors: int = 60000, rounds: int = 40, seed: int = 0) -> tuple[list[int], float]:
    """(levels over 127, squared error of unit variance), by Lloyd's two steps with the scale's search in the first."""
    y = torch.randn(vectors, group, generator=torch.Generator().manual_seed(seed))
    levels = torch.linspace(-1, 7 / 8, 16)
    for _ in range(rounds):
        covering = extreme(y) / levels[levels.abs().argmax()]
        least = torch.full((vectors, 1), torch.inf)
        codes, scales = torch.zeros_like(y, dtype=torch.long), covering
        for factor in SEARCH_SIGNED:
            tried = torch.bucketize(y / (covering * factor), (levels[1:] + levels[:-1]) / 2)
            error = (y - levels[tried] * covering * factor).square().sum(-1, keepdim=True)
            better = error < least
            codes, scales = torch.where(better, tried, codes), torch.where(better, covering * factor, scales)
            least = torch.minimum(least, error)
        weight = torch.zeros(16).index_add_(0, codes.flatten(), scales.square().expand_as(y).flatten())
        total = torch.zeros(16).index_add_(0, codes.flatten(), (y * scales).flatten())
        levels = (total / weight.clamp_min(1e-9)).sort().values
        levels = levels / levels.abs().max()
    return [round(127 * level) for level in levels.tolist()], least.sum().item() / y.numel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--group", type=int, default=32)
    found, error = train(parser.parse_args().group)
    print(f"levels {found}, squared error {error:.5f}")
