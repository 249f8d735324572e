"""Watches whether packing still loses as little as it did: for long texts whose keys may wander from the offset."""

from __future__ import annotations

import warnings

import torch

BOUND = 0.25  # of the output's length; 4-bit recipes that suit their model stay below a tenth


class DriftMonitor:
    """Every `every` tokens, one layer's attention to its newest `every` tokens, packed against raw.

    errors: [(tokens seen, |packed - raw| / |raw|)] so far, the largest over the batch. One above `bound` warns, once.
    It keeps `every` tokens of one layer raw beside the cache.
    """

    def __init__(self, every: int, bound: float = BOUND):
        if every < 32:
            raise ValueError(f"drift_every: got {every}; takes 0 or at least 32 tokens")
        self.every, self.bound = every, bound
        self.errors: list[tuple[int, float]] = []
        self._warned = False
        self._restart(0)

    def _restart(self, seen):
        self._raw, self._seen, self._last = None, seen, seen

    def observe(self, layer, query, step, scaling):
        """Called when `layer` attends: query [batch, heads, queries, head_dim], its Step, and the scaling of scores."""
        if self._raw is not None and (step.start != self._seen or self._raw[0].shape[0] != step.k.shape[0]):
            self._restart(step.start)  # cropped, reordered to another batch or reset
        new = (step.k.detach(), step.v.detach())
        joined = new if self._raw is None else tuple(torch.cat(pair, 2) for pair in zip(self._raw, new, strict=True))
        self._raw = tuple(x[:, :, -self.every :].clone() for x in joined)
        self._seen = step.length
        held = self._raw[0].shape[2]
        if step.length - self._last < self.every or held < self.every or layer.native.visible < held:
            return
        self._last = step.length
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        packed, raw = (_attend(query[:, :, -1:], *pair, scale) for pair in (layer._unpack(held), self._raw))
        off, length = (x.flatten(1).norm(dim=1) for x in (packed - raw, raw))
        error = (off / length.clamp_min(1e-9)).max().item()
        self.errors.append((step.length, error))
        if error > self.bound and not self._warned:
            self._warned = True
            warnings.warn(
                f"Int4Cache: layer {layer.layer_idx} after {step.length} tokens: packed attention is {error:.2f} of "
                f"its output's length away from raw (bound {self.bound}); a recipe with more bits would suit this text",
                stacklevel=2,
            )


def _attend(query, key, value, scale):
    fold = query.shape[1] // key.shape[1]
    key, value = (x.float().repeat_interleave(fold, 1) for x in (key, value))
    return (query.float() @ key.mT * scale).softmax(-1) @ value
