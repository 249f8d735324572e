"""The K offset of a model with a key bias, from its weights alone: for prompts too short to take a mean of."""

import sys

import torch

from .rope import rope_frequencies

ROPE_POSITIONS = 2048  # over which a bias is averaged


def bias_offset(module, shared, kv_heads, head_dim, span=0):
    """The mean K of an attention module over many positions, from its k_proj.bias alone: float32 [kv_heads, head_dim].

    In CPU memory. RoPE turns the bias with the position. For a fixed offset, its mean over positions 0..2047 stays on
    slow channels and vanishes on fast ones; span > 0: for one that turns from span to span of so many tokens, so does
    the mean around the middle of one. None where there is no bias, or where K is not simply the turned projection.
    """
    bias = _own_bias(getattr(module, "k_proj", None))
    rotate_half = getattr(sys.modules.get(type(module).__module__), "rotate_half", None)
    if bias is None or bias.numel() != kv_heads * head_dim or rotate_half is None or hasattr(module, "k_norm"):
        return None
    if rotate_half(torch.arange(4.0, device="cpu")).tolist() != [-2.0, -3.0, 0.0, 1.0]:
        return None  # pairs neighbours instead of halves
    kind = getattr(module, "layer_type", None)
    if (kind, span) not in shared.rope_means:
        positions = torch.arange(span or ROPE_POSITIONS, device="cpu") - ((span - 1) // 2 if span else 0)
        shared.rope_means[kind, span] = _rope_mean(module.config, kind, head_dim, positions)
    if shared.rope_means[kind, span] is None:
        return None
    cos, sin = shared.rope_means[kind, span]
    offset = bias.detach().float().cpu().reshape(kv_heads, head_dim).clone()
    turned = offset[:, : cos.numel()]
    offset[:, : cos.numel()] = turned * cos + rotate_half(turned) * sin
    return offset.contiguous()


def _own_bias(linear):
    """The part of a layer's bias that this process adds, or None."""
    bias = getattr(linear, "bias", None)
    if hasattr(bias, "to_local"):  # tensor parallel: the rank's heads
        return bias.to_local()
    if bias is not None and bias.is_meta:  # accelerate brings it from disk while the layer runs, and only then
        return (getattr(getattr(linear, "_hf_hook", None), "weights_map", None) or {}).get("bias")
    return bias


def _rope_mean(config, kind, head_dim, positions):
    """Mean cos and sin over positions, [rotated channels] each, or None for an unknown kind of RoPE."""
    found = rope_frequencies(config, kind, head_dim)
    if found is None:
        return None
    frequency, factor = found
    angle = positions.float()[:, None] * frequency
    return [(wave.mean(0) * factor).repeat(2) for wave in (angle.cos(), angle.sin())]
