"""What the layers of one cache have in common: the config, and each other."""

import torch

from . import _native
from .rope import layer_rope


class Shared:
    """What the layers of one cache have in common: the config to watch, and each other."""

    def __init__(self, config):
        self.config = config
        self.layers = []
        self.packed = False  # attention reads packed layers, so update returns handles
        self.rope_means = {}
        self._ropes = {}

    def begin_forward(self, first):
        """Called by the first layer's update: looks up the attention, keeps thread counts equal and layers in step."""
        self.packed = self.config._attn_implementation == "halfbyte"
        threads = torch.get_num_threads()
        if threads != _native.num_threads():
            _native.set_num_threads(threads)
        last = self.layers[-1]
        if last.seen != first.seen:
            paired = getattr(self.config, "is_encoder_decoder", False)
            pair = "EncoderDecoderCache(Int4Cache(config), DynamicCache(config=config)), and " if paired else ""
            raise ValueError(
                f"past_key_values: layer {first.layer_idx} holds {first.seen} tokens but layer {last.layer_idx} "
                f"{last.seen}: takes {pair}a model with the layers of the config that the cache was made with "
                "(call reset() after a forward pass that was interrupted)"
            )

    def rope(self, layer, head_dim):
        """The Rope by which a layer's keys turn, or None: see layer_rope."""
        kind = "sliding_attention" if layer.is_sliding else "full_attention"
        key = (kind, head_dim) if _is_like_others(self.config, layer.layer_idx) else (kind, head_dim, layer.layer_idx)
        if key not in self._ropes:
            self._ropes[key] = layer_rope(self.config, layer.layer_idx, kind, head_dim)
        return self._ropes[key]

    def roll_back(self, length):
        """Takes the layers that a failed forward pass has already advanced back to `length` tokens.

        A block that the failed pass completed stays packed; any other content is as before.
        """
        for layer in self.layers:
            if layer.seen > length:
                layer.forget(layer.seen - length)


def _is_like_others(config, layer_idx):
    """Whether a layer has the positions of all others of its kind."""
    per_layer = getattr(config, "per_layer_config", None)  # of newer transformers: the config itself where it is alike
    return not getattr(config, "no_rope_layers", None) and (per_layer is None or per_layer[layer_idx] is config)


def check_config(config):
    """Raises unless it is a config of the library's."""
    if not hasattr(config, "get_text_config"):
        raise ValueError(f"config: got {type(config).__name__}, takes a model's config, such as model.config")


def check_against_config(config, layer_idx, kv_heads, head_dim):
    """Raises if the K of a model can not be that of this config; only where the config says plainly what K is."""
    layer_configs = getattr(config, "per_layer_config", None)  # of newer transformers
    config = config if layer_configs is None else layer_configs[layer_idx]
    named = [name for name in vars(config) if "head_dim" in name]
    wants_dim = getattr(config, "head_dim", None) if named == ["head_dim"] else None
    wants_heads = getattr(config, "num_key_value_heads", None)
    wrong_dim = isinstance(wants_dim, int) and wants_dim != head_dim
    # Fewer heads are fine: a tensor-parallel rank has its share.
    wrong_heads = wants_dim and isinstance(wants_heads, int) and wants_heads % kv_heads
    if wrong_dim or wrong_heads:
        raise ValueError(
            f"past_key_values: got K of {kv_heads} heads and head_dim {head_dim}, takes {wants_heads} heads and "
            f"head_dim {wants_dim} as in the config that the cache was made with"
        )


def alike(where, k, v):
    """V in the dtype of K, which RoPE leaves in float32 under autocast. ValueError for two dtypes without autocast."""
    if k.dtype is v.dtype:
        return v
    if not torch.is_autocast_enabled(k.device.type):
        raise ValueError(f"{where}: value_states: got {v.dtype}, takes {k.dtype} as key_states")
    return v.to(k.dtype)


def tensor_bytes(value):
    """Bytes of all tensors in nested lists and dicts."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return 0
    return sum(tensor_bytes(item) for item in value)
