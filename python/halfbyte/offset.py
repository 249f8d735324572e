"""The K offset of a model with a key bias, from its weights alone: for prompts too short to take a mean of."""

import sys

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ROPE_POSITIONS = 2048  # over which a bias is averaged


def bias_offset(module, shared, kv_heads, head_dim):
    """The mean K of an attention module over many positions, from its k_proj.bias alone: float32 [kv_heads, head_dim].

    In CPU memory.

    RoPE turns the bias with the position; its mean over positions 0..2047 stays on slow channels and vanishes on fast
    ones. None where there is no bias, or where K is not simply the turned projection.
    """
    bias = _own_bias(getattr(module, "k_proj", None))
    rotate_half = getattr(sys.modules.get(type(module).__module__), "rotate_half", None)
    if bias is None or bias.numel() != kv_heads * head_dim or rotate_half is None or hasattr(module, "k_norm"):
        return None
    if rotate_half(torch.arange(4.0)).tolist() != [-2.0, -3.0, 0.0, 1.0]:
        return None  # pairs neighbours instead of halves
    kind = getattr(module, "layer_type", None)
    if kind not in shared.rope_means:
        shared.rope_means[kind] = _rope_mean(module.config, kind, head_dim)
    if shared.rope_means[kind] is None:
        return None
    cos, sin = shared.rope_means[kind]
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


def rope_frequencies(config, kind, head_dim):
    """(radians a position for each pair of channels [rotated / 2], factor on the waves) of a layer's RoPE.

    kind: its layer type, for configs with a RoPE for each. None for an unknown kind of RoPE.
    """
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return None
    nested = kind in rope and isinstance(rope[kind], dict)
    rope = rope[kind] if nested else rope
    name = rope.get("rope_type", "default")
    if name == "default":
        rotated = int(head_dim * rope.get("partial_rotary_factor", 1.0))
        return 1.0 / rope["rope_theta"] ** (torch.arange(0, rotated, 2).float() / rotated), 1.0
    if name in ROPE_INIT_FUNCTIONS:
        return ROPE_INIT_FUNCTIONS[name](config, torch.device("cpu"), layer_type=kind if nested else None)
    return None


def _rope_mean(config, kind, head_dim):
    """Mean cos and sin over positions 0..2047, [rotated channels] each, or None for an unknown kind of RoPE."""
    found = rope_frequencies(config, kind, head_dim)
    if found is None:
        return None
    frequency, factor = found
    angle = torch.arange(ROPE_POSITIONS).float()[:, None] * frequency
    return [(wave.mean(0) * factor).repeat(2) for wave in (angle.cos(), angle.sin())]
