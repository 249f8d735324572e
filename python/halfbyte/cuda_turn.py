"""Offsets on a device: means of tokens, and how that of K follows RoPE by the angles of halfbyte.rope."""

import torch

from .rope import Rope

PIECE_TOKENS = 4096  # summed at a time; a multiple of every span
FEWEST_SPANS = 256


def mean_of(spans, side, total, weights):
    """Mean of K or V over the first `total` tokens, by weights [batch, total] or all alike: float32 [batch, heads, d].

    spans: [(first position, end, (K, V))], one after the other from 0.
    """
    sums = 0.0
    for begin, end, pair in spans:
        x, end = pair[side], min(end, total)
        if weights is None:
            sums = sums + x[:, :, : end - begin].sum(2, dtype=torch.float32)
            continue
        for at in range(begin, end, PIECE_TOKENS):
            to = min(at + PIECE_TOKENS, end)
            sums = sums + (x[:, :, at - begin : to - begin].float() * weights[:, None, at:to, None]).sum(2)
    return sums / (total if weights is None else weights.sum(1)[:, None, None])


class Turn:
    """Spans of `span` tokens share an offset: mu, turned to the middle of the span."""

    _waves = {}  # noqa: RUF012 - {(frequencies, span, device): [spans, pairs, 2]}, which layers of all caches share

    def __init__(self, frequencies, interleaved, span, device):
        self.rope = Rope(frequencies.to(device), interleaved)
        self.interleaved, self.span, self.pairs, self.device = interleaved, span, frequencies.numel(), device
        self._key = frequencies.cpu().numpy().tobytes(), span, device

    def _middles(self, first, last):
        spans = torch.arange(first, last, device=self.device, dtype=torch.float64)
        return spans * self.span + (self.span - 1) // 2

    def turn(self, mu, first, last):
        """mu [batch, kv_heads, head_dim] as spans first to last - 1 have it: [batch, kv_heads, spans, head_dim]."""
        return self.rope.turn(mu[:, :, None].expand(-1, -1, last - first, -1), self._middles(first, last)).contiguous()

    def waves(self, tokens):
        """cos and sin in the middle of the spans of so many tokens, and more: float32 [spans, pairs, 2]."""
        spans, held = -(-tokens // self.span), self._waves.get(self._key)
        if held is None or held.shape[0] < spans:
            spans = max(FEWEST_SPANS, 1 << (spans - 1).bit_length())
            angle = self._middles(0, spans)[:, None] * self.rope.frequencies.double()
            held = self._waves[self._key] = torch.stack((angle.cos(), angle.sin()), -1).float()
        return held

    def mean_of(self, spans, side, total, weights):
        """Mean of the first `total` tokens, each turned back by its span's angle; as mean_of otherwise."""
        sums = 0.0
        for begin, end, pair in spans:
            end = min(end, total)
            for at in range(begin, end, PIECE_TOKENS):
                to = min(at + PIECE_TOKENS, end)
                x = pair[side][:, :, at - begin : to - begin].float()
                if weights is not None:
                    x = x * weights[:, None, at:to, None]
                first, last = at // self.span, (to - 1) // self.span + 1
                whole = torch.nn.functional.pad(x, (0, 0, at - first * self.span, last * self.span - to))
                of_spans = whole.unflatten(2, (last - first, self.span)).sum(3)
                sums = sums + self.rope.turn(of_spans, -self._middles(first, last)).sum(2)
        return sums / (total if weights is None else weights.sum(1)[:, None, None])
