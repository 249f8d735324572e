"""How RoPE turns the keys of each layer of a model, as its config and code say: what an offset that turns needs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# Kinds of RoPE whose frequencies are the same at any length.
STEADY = ("default", "linear", "llama3", "yarn", "proportional")
# Models with a window whose full layers have no positions.
ONLY_SLIDING = ("cohere2", "exaone4", "exaone_moe")


@dataclasses.dataclass(frozen=True)
class Rope:
    """frequencies: float32 [pairs], radians a token. Pair i: channels i and i + pairs, or 2 i and 2 i + 1."""

    frequencies: torch.Tensor
    interleaved: bool = False

    def turn(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """x [..., tokens, head_dim] turned as RoPE turns it at position [tokens]; channels behind the pairs stay."""
        angle = position[:, None].double() * self.frequencies.double()
        return turn_pairs(x, angle.cos().to(x.dtype), angle.sin().to(x.dtype), self.interleaved)


def turn_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x [..., tokens, head_dim] with its pairs of channels turned by cos, sin [tokens, pairs]; see Rope for pairs."""
    pairs = cos.shape[-1]
    of_pairs = x[..., : 2 * pairs].unflatten(-1, (pairs, 2) if interleaved else (2, pairs))
    at = -1 if interleaved else -2
    a, b = of_pairs.unbind(at)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), at).flatten(-2)
    return torch.cat((turned, x[..., 2 * pairs :]), -1)


def layer_rope(config, layer_idx: int, kind: str, head_dim: int) -> Rope | None:
    """The Rope of one layer's cached keys, or None: no positions, frequencies that change with length, or not known.

    config: of the decoder; kind: the layer's type, "full_attention" or "sliding_attention". Another answer than the
    model's truth costs quality, never correctness.
    """
    per_layer = getattr(config, "per_layer_config", None)  # of newer transformers
    own = config if per_layer is None else per_layer[layer_idx]
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "cross_attention_hidden_size", None):
        return None  # keys of the other sequence have no positions of this one
    if getattr(config, "qk_rope_head_dim", None):
        return None  # positions are in the last channels, behind a latent part
    with_rope = getattr(config, "no_rope_layers", None)
    if with_rope and layer_idx < len(with_rope) and not with_rope[layer_idx]:
        return None
    if config.model_type.startswith(ONLY_SLIDING) and kind == "full_attention" and getattr(config, "sliding_window", 0):
        return None
    found = rope_frequencies(own, kind, head_dim)
    interleaved = pairs_side_by_side(config)
    if found is None or interleaved is None or 2 * found[0].numel() > head_dim:
        return None
    return Rope(found[0].float().contiguous(), interleaved)


def rope_frequencies(config, kind, head_dim):
    """(radians a position for each pair of channels [rotated / 2], factor on the waves) of a layer's RoPE.

    kind: its layer type, for configs with a RoPE for each. None for a RoPE of unknown or of no steady kind.
    """
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return None
    nested = kind in rope and isinstance(rope[kind], dict)
    rope = rope[kind] if nested else rope
    name = rope.get("rope_type", "default")
    if name not in STEADY:
        return None
    if name == "default":
        return default_frequencies(rope["rope_theta"], int(head_dim * rope.get("partial_rotary_factor", 1.0))), 1.0
    return ROPE_INIT_FUNCTIONS[name](config, torch.device("cpu"), layer_type=kind if nested else None)


@functools.lru_cache(maxsize=256)  # layers and caches ask for the same again and again
@torch.inference_mode(False)  # they serve training as well
def default_frequencies(theta, rotated):
    return 1.0 / theta ** (torch.arange(0, rotated, 2, device="cpu").float() / rotated)


def pairs_side_by_side(config) -> bool | None:
    """Whether RoPE pairs neighbouring channels, or those half a head apart; None where the model's code is unknown."""
    return _pairs_side_by_side(type(config).__module__)


@functools.cache
def _pairs_side_by_side(config_module):
    package, _, name = config_module.rpartition(".")
    try:
        module = importlib.import_module(f"{package}.{name.replace('configuration_', 'modeling_', 1)}")
    except ImportError:
        return None
    return {(-2.0, -3.0, 0.0, 1.0): False, (-1.0, 0.0, -3.0, 2.0): True}.get(quarter_turn(module))


def quarter_turn(module) -> tuple | None:
    """What the model's own code makes of channels 0, 1, 2, 3 when it turns them by a right angle."""
    x = torch.arange(4.0, device="cpu")
    with contextlib.suppress(AttributeError, TypeError, RuntimeError, ValueError, IndexError):
        if hasattr(module, "rotate_half"):
            return tuple(module.rotate_half(x).tolist())
        half = x.new_ones(1, 1, 2)
        keys = module.apply_rotary_pos_emb(x[None, None, None], x[None, None, None], 0 * half, half)[1]
        return tuple(keys.flatten().tolist())
    return None
