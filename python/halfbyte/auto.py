"""recipe="auto": chooses a recipe from what a model's config and weights say about its keys, and says why."""

from __future__ import annotations

from .layer import Int4Layer
from .recipes import bits_per_value
from .rope import layer_rope

# Biases this many times what a channel varies by are more than a fixed offset takes off, as RoPE turns them away from
# it: then scales for smaller groups of V pay for what K still loses. An offset that turns follows them, and leaves no
# more than models without biases lose (docs/results/quality.md, "ablation").
LARGE_BIAS = 8.0


def choose_recipe(config, kinds, model=None):
    """(recipe name, reasons): `g32` where key biases are large and no offset follows them, else `default`.

    config: of the decoder; kinds: its layer types; model: its weights are looked at where given.
    """
    reasons = [_of_config(config, kinds)]
    if model is None:
        return "default", [*reasons, "no model was given, so key biases were not looked at"]
    sizes = {index: size for index, size in enumerate(bias_sizes(model)) if size is not None}
    if not sizes:
        return "default", [*reasons, "keys have no bias"]
    largest = max(sizes, key=sizes.get)
    left = [index for index, size in sizes.items() if size > LARGE_BIAS and not _followed(config, kinds, index)]
    chosen = (
        "g32, 4.5 bits a value, as no offset follows RoPE here" if left else "default, as the offset takes them off"
    )
    found = f"key biases reach {sizes[largest]:.3g} times what a channel varies by (layer {largest}): {chosen}"
    return "g32" if left else "default", [*reasons, found]


def _followed(config, kinds, index) -> bool:
    """Whether a layer's offset turns with its keys."""
    return layer_rope(config, index, kinds[index], head_size(config)) is not None


def bias_sizes(model) -> list[float | None]:
    """For each attention layer: the largest key bias over the norm a typical row of k_proj gives a unit input.

    Inputs of k_proj come out of a norm with weight g: sum of (w g)^2 is the variance of w.x for white x. None where a
    layer has no k_proj with a bias of its own in memory.
    """
    sizes = {}
    for module in model.modules():
        projection = getattr(module, "k_proj", None)
        index = getattr(module, "layer_idx", None)
        if projection is None or index is None:
            continue
        bias, weight = getattr(projection, "bias", None), getattr(projection, "weight", None)
        if bias is None or bias.is_meta or not weight.is_floating_point():
            sizes[index] = None
            continue
        gain = _input_norm(model, index)
        rows = weight.detach().float() * (1.0 if gain is None else gain)
        sizes[index] = (bias.detach().float().abs().max() / rows.norm(dim=1).median().clamp_min(1e-9)).item()
    return [sizes[index] for index in sorted(sizes)]


def _input_norm(model, index):
    for name, parameter in model.named_parameters():
        if name.endswith(f"layers.{index}.input_layernorm.weight"):
            return parameter.detach().float()
    return None


def head_size(config) -> int:
    """Channels of a head, as the config says."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _of_config(config, kinds) -> str:
    head_dim = head_size(config)
    facts = [
        f"heads of {head_dim}",
        f"{sum(kind == 'sliding_attention' for kind in kinds)} of {len(kinds)} layers slide",
    ]
    rope = getattr(config, "rope_parameters", None) or {}
    bases = [part.get("rope_theta") for part in [rope, *(p for p in rope.values() if isinstance(p, dict))]]
    bases = sorted({base for base in bases if base})
    if bases:
        facts.append("RoPE base " + " and ".join(f"{base:,.0f}" for base in bases))
    if getattr(config, "use_qk_norm", False) or config.model_type.startswith(("qwen3", "gemma3", "olmo2")):
        facts.append("keys are normalised")
    return ", ".join(facts)


def _offset_of(recipe, layers, head_dim) -> str:
    if not recipe.offset:
        return "no offset"
    turning = sum(layer.turns(head_dim) for layer in layers)
    where = "" if turning == len(layers) else f" in {turning} of {len(layers)} layers"
    return f"offset turning with RoPE every {recipe.offset_span} tokens{where}" if turning else "fixed offset"


def explain(config, recipe, layer_recipes, layers, reasons) -> str:
    """Three lines about a cache: what is packed, what its recipe does, and why."""
    packed = [index for index, layer in enumerate(layers) if isinstance(layer, Int4Layer)]
    head_dim = head_size(config)
    bits = [bits_per_value(layer_recipes[index], head_dim) for index in packed]
    mean = sum(bits) / len(bits) if bits else 0.0
    own = [
        f"{i}: K {layer_recipes[i].k_bits} V {layer_recipes[i].v_bits}" for i in packed if layer_recipes[i] != recipe
    ]

    def side(bits, group):
        return f"{bits} bits, a scale for {f'{group} channels' if group else 'each vector'}"

    return "\n".join(
        [
            f"{len(packed)} of {len(layers)} layers are packed, {mean:.2f} bits a value with heads of {head_dim}"
            + (f"; bits of layers with their own recipe: {', '.join(own)}" if own else ""),
            f"K {side(recipe.k_bits, recipe.k_group)}; V {side(recipe.v_bits, recipe.v_group)}; "
            f"rotation {recipe.rotation}, {_offset_of(recipe, [layers[i] for i in packed], head_dim)}, "
            f"{'scales searched' if recipe.search else 'no search'}, "
            + (f"the first {recipe.sink_tokens} tokens raw" if recipe.sink_tokens else "no tokens raw for good"),
            "because: " + ("; ".join(reasons) if reasons else "the caller asked for this recipe"),
        ]
    )
