"""Offsets on a GPU: means of tokens, and how that of K follows RoPE from one span of tokens to the next."""

import torch

from .rope import turn_pairs

PIECE_TOKENS = 4096  # summed at a time; a multiple of every span
FEWEST_SPANS = 256


class Turn:
    """Tokens of a span share an offset: mu, turned to the middle of the span.

    frequencies, interleaved: as of a Rope, in CPU memory; doubles: whether the device computes in float64.
    """

    _waves = {}  # noqa: RUF012 - {(frequencies, span, device): [spans, pairs, 2]}, which layers of all caches share

    def __init__(self, frequencies, interleaved, span, device, doubles):
        self.frequencies, self.interleaved, self.span, self.device = frequencies, interleaved, span, device
        self.pairs = frequencies.numel()
        self._where = device if doubles else "cpu"
        self._key = frequencies.numpy().tobytes(), span, device

    def waves(self, tokens):
        """cos and sin in the middle of the spans of so many tokens, and more: float32 [spans, pairs, 2]."""
        spans, held = -(-tokens // self.span), self._waves.get(self._key)
        if held is None or held.shape[0] < spans:
            spans = max(FEWEST_SPANS, 1 << (spans - 1).bit_length())
            middles = torch.arange(spans, device=self._where) * self.span + (self.span - 1) // 2
            angle = middles[:, None] * self.frequencies.to(self._where).double()
            held = torch.stack((angle.cos(), angle.sin()), -1).float().to(self.device)
            self._waves[self._key] = held
        return held

    def _turned(self, x, first, last, sign=1.0):
        """x [..., spans, head_dim] of spans first to last - 1 turned by their angles, or back."""
        cos, sin = self.waves(last * self.span)[first:last].unbind(-1)
        return turn_pairs(x, cos, sign * sin, self.interleaved)

    def offsets(self, mu, first, last):
        """mu [batch, kv_heads, head_dim] as spans first to last - 1 have it: [batch, kv_heads, spans, head_dim]."""
        return self._turned(mu[:, :, None].expand(-1, -1, last - first, -1), first, last).contiguous()

    def sum_back(self, x, at):
        """Sum over tokens of x [batch, kv_heads, tokens, head_dim] from position `at`, each turned back by its span."""
        to = at + x.shape[2]
        first, last = at // self.span, -(-to // self.span)
        whole = torch.nn.functional.pad(x, (0, 0, at - first * self.span, last * self.span - to))
        of_spans = whole.unflatten(2, (last - first, self.span)).sum(3)
        return self._turned(of_spans, first, last, -1.0).sum(2)


def mean_of(spans, side, total, weights, turn=None):
    """Mean of K or V over the first `total` tokens, turned back if it turns: float32 [batch, kv_heads, head_dim].

    spans: [(first position, end, (K, V))], one after the other from 0; weights: [batch, total], or None for all alike.
    """
    sums = 0.0
    for begin, end, pair in spans:
        end = min(end, total)
        for at in range(begin, end, PIECE_TOKENS):
            to = min(at + PIECE_TOKENS, end)
            x = pair[side][:, :, at - begin : to - begin].float()
            if weights is not None:
                x = x * weights[:, None, at:to, None]
            sums = sums + (x.sum(2) if turn is None else turn.sum_back(x, at))
    # By a tensor in either case: a GPU divides by a number as it multiplies by 1 / number, which rounds otherwise.
    return sums / (sums.new_full((), total) if weights is None else weights.sum(1)[:, None, None])
