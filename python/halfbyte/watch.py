"""Shows a hook the keys and values of a running model, which it may replace: for calibration and simulated codecs."""

from __future__ import annotations

import contextlib
import dataclasses

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

WATCH = "halfbyte_watch"
BLOCK_TOKENS = 16  # as in docs/format.md


@dataclasses.dataclass(frozen=True)
class BlockRule:
    """Which keys a query sees raw: its own block, `raw_window` tokens of blocks before it, and the first `sink_tokens`.

    The first `prefill` queries see only raw ones, as the first prefill of a cache does.
    """

    prefill: int = 0
    sink_tokens: int = 0
    raw_window: int = 0

    def sees_raw(self, queries: int, tokens: int) -> torch.Tensor:
        """bool [queries, tokens]; the queries are the last ones of `tokens`."""
        key = torch.arange(tokens)
        query = key[tokens - queries :, None]
        near = key // BLOCK_TOKENS >= query // BLOCK_TOKENS - self.raw_window // BLOCK_TOKENS
        return near | (key < self.sink_tokens) | (query < self.prefill)


_active = None  # (hook, BlockRule or None); set by watch_attention for the time of its block


def _watching_attention(module, query, key, value, attention_mask, **kwargs):
    if _active is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    hook, rule = _active
    packed = hook(module.layer_idx, query, key, value)
    if rule is None:
        return sdpa_attention_forward(module, query, *packed, attention_mask, **kwargs)
    return attend_mixed(query, (key, value), packed, rule, attention_mask, **kwargs), None


AttentionInterface.register(WATCH, _watching_attention)
AttentionMaskInterface.register(WATCH, sdpa_mask)


def attend_mixed(query, raw, packed, rule, mask, scaling=None, softcap=None, s_aux=None, **kwargs):
    """Attention [batch, queries, heads, head_dim] that reads raw or packed (K, V) as `rule` says for each pair.

    query: [batch, heads, queries, head_dim]; raw, packed: pairs of [batch, kv_heads, tokens, head_dim]; mask: bool or
    additive, None: causal. A plain double loop over tokens in matrix form: a reference, not a fast path.
    """
    if s_aux is not None:
        raise NotImplementedError("s_aux: the simulated block rule does not take attention sinks; use protocol packed")
    fold = query.shape[1] // raw[0].shape[1]
    raw, packed = ([x.repeat_interleave(fold, 1) for x in pair] for pair in (raw, packed))
    queries, tokens = query.shape[2], raw[0].shape[2]
    sees_raw = rule.sees_raw(queries, tokens)
    scores = torch.where(sees_raw, query @ raw[0].mT, query @ packed[0].mT)
    scores *= query.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if mask is None:
        mask = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    out = (weights * sees_raw) @ raw[1] + (weights * ~sees_raw) @ packed[1]
    return out.transpose(1, 2).contiguous()


@contextlib.contextmanager
def attention_set_to(model, implementation: str):
    """Within the block, `model` attends with `implementation`; afterwards with what it had."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def watch_attention(model, hook, rule: BlockRule | None = None):
    """Within the block, every layer's keys (after RoPE) and values pass through `hook` before they are attended.

    hook(layer_index, query, key, value) -> (key, value), each [batch, heads, tokens, head_dim]; with `rule`, what it
    returns is read only where the rule says packed. RuntimeError when nested.
    """
    global _active
    if _active is not None:
        raise RuntimeError("watch_attention: another one is active in this process")
    _active = hook, rule
    try:
        with attention_set_to(model, WATCH):
            yield
    finally:
        _active = None


@contextlib.contextmanager
def watch_projections(model, hook):
    """Within the block, what k_proj and v_proj give, before norms and RoPE, passes through `hook`.

    hook(layer_index, which, x) -> x, with which "k" or "v" and x [batch, kv_heads, tokens, head_dim]: the protocol of
    arXiv 2605.05699 for models it had no cache for. NotImplementedError for a model whose projections are fused.
    """
    found = [m for m in model.modules() if hasattr(m, "k_proj") and hasattr(m, "v_proj") and hasattr(m, "layer_idx")]
    if not found:
        raise NotImplementedError(
            f"protocol: pre-rope takes a model with k_proj and v_proj, not {type(model).__name__}"
        )
    handles = []
    for attention in found:
        for which in ("k", "v"):
            head_dim, layer = attention.head_dim, attention.layer_idx

            def replace(module, args, out, which=which, head_dim=head_dim, layer=layer):
                heads = out.unflatten(-1, (-1, head_dim)).transpose(1, 2)
                return hook(layer, which, heads).transpose(1, 2).flatten(-2)

            handles.append(getattr(attention, f"{which}_proj").register_forward_hook(replace))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
