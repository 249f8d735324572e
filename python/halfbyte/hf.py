"""Int4Cache: a transformers cache that holds K and V in 4 bits, for model.generate(past_key_values=...)."""

import copy
import functools
import warnings
from pathlib import Path

import torch
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, DynamicCache, get_layer_types_and_kwargs

from . import _native
from .auto import choose_recipe, explain
from .drift import DriftMonitor
from .layer import Int4Layer
from .recipes import get_recipe, layer_recipes, needs_calibration
from .shared import Shared, check_config, tensor_bytes

PACKED_LAYERS = ("full_attention", "sliding_attention")
CONSISTENT_OFFSET_TOKENS = 64  # the mean of so few costs a tenth more KL than that of a long prompt

__all__ = ["Int4Cache", "Int4Layer"]

# PyTorch's own OpenMP threads, where its build carries a GNU one: they spin between operations, and threads of ours
# would compete with them for the same cores (docs/decisions/threads.md).
for _path in Path(torch.__file__).parent.glob("lib/libgomp*.so*"):
    if _native.use_openmp(str(_path)):
        break


class Int4Cache(DynamicCache):
    """KV cache in 4 bits, for generate(past_key_values=...) after model.set_attn_implementation("halfbyte").

    config: the model's config; model.config itself, not a copy. recipe: a name from halfbyte.recipes.RECIPES or a
    Recipe, or "auto": chosen from the config and, given `model`, from its weights; explain() says why. overrides: its
    fields, such as sink_tokens=0. layers: {layer: recipe or dict of fields} for layers that differ, -1 the last one,
    such as {0: "k8v4", -1: {"v_group": 32}}. drift_every: every so many tokens compare packed attention with raw on one
    layer, and warn when they part (halfbyte.drift). Offsets are the mean K and V of the first prefill, and K's turns
    with RoPE (halfbyte.rope says by which frequencies). calibration: a halfbyte.calibrate.Calibration, for recipes
    with lambda or learned rotations; if it has offsets, they take the place of the prompt's.

    Full and sliding attention layers are packed; other kinds of layer are the library's own. A query sees packed values
    for the blocks of 16 tokens that were complete before its own block, raw ones from there on and for the first
    sink_tokens. The first prefill is exempt: it attends exactly to its own raw K, V. With prefill="consistent" it is
    not, offsets are the mean of the first 64 tokens, and attention computes in float32: what is stored and computed for
    a token then depends on the tokens before it alone, not on how they were split into steps. That is slower; it is for
    comparing runs. Under any other attn_implementation everything works on unpacked tensors, slower.

    Raises ValueError for unknown recipes or fields, for values that are not finite, and for a model of another shape,
    dtype or batch than the cache holds; NotImplementedError under torch.export. Under torch.compile it
    breaks the graph: Int4StaticCache does not.
    """

    def __init__(
        self,
        config,
        recipe="default",
        calibration=None,
        prefill="exact",
        layers=None,
        model=None,
        drift_every=0,
        **overrides,
    ):
        check_config(config)
        if prefill not in ("exact", "consistent"):
            raise ValueError(f"prefill: got {prefill!r}, takes 'exact' or 'consistent'")
        self.prefill = prefill
        consistent = prefill == "consistent"
        text_config = config.get_text_config(decoder=True)
        kinds, options = get_layer_types_and_kwargs(text_config)
        if isinstance(options, dict):  # before transformers 5.19: those of all kinds together
            options = [options] * len(kinds)
        self._reasons = None
        if recipe == "auto":
            recipe, self._reasons = choose_recipe(text_config, kinds, model)
        self.recipe = get_recipe(recipe, **overrides)
        if consistent and self.recipe.offset and not self.recipe.offset_tokens:
            self.recipe = get_recipe(self.recipe, offset_tokens=CONSISTENT_OFFSET_TOKENS)
        self.layer_recipes = layer_recipes(self.recipe, layers, len(kinds))
        _check_calibration(calibration, self.layer_recipes)
        self._shared = Shared(text_config)
        made = [
            self._make_layer(index, kind, of_kind, calibration)
            for index, (kind, of_kind) in enumerate(zip(kinds, options, strict=True))
        ]
        Cache.__init__(self, layers=made)
        if not self._shared.layers:
            names = ", ".join(sorted({type(layer).__name__ for layer in made}))
            warnings.warn(f"Int4Cache: nothing is packed: the layers of this model are {names}", stacklevel=2)
        if drift_every and self._shared.layers:
            full = [layer for layer in self._shared.layers if not layer.is_sliding]
            (full or self._shared.layers)[-1].drift = DriftMonitor(drift_every)

    @property
    def drift(self):
        """The DriftMonitor that drift_every asked for, with the errors it has seen; None without."""
        return next((layer.drift for layer in self._shared.layers if layer.drift is not None), None)

    def _make_layer(self, index, kind, options, calibration):
        if kind in PACKED_LAYERS:
            window = (options.get("sliding_window") or 0) if kind == "sliding_attention" else 0
            recipe, consistent = self.layer_recipes[index], self.prefill == "consistent"
            return self._make_packed_layer(recipe, index, self._shared, window, calibration, consistent)
        if kind in DYNAMIC_LAYER_TYPE_MAPPING:
            return self._make_library_layer(kind, options)
        known = ", ".join(sorted(DYNAMIC_LAYER_TYPE_MAPPING))
        raise ValueError(f"config: layer {index} is of type {kind!r}, takes one of {known}")

    def _make_packed_layer(self, *args):
        return Int4Layer(*args)

    def _make_library_layer(self, kind, options):
        return DYNAMIC_LAYER_TYPE_MAPPING[kind](**options)

    def explain(self):
        """Three lines: what is packed how, what keeps its error small, and why recipe="auto" chose it (or who did)."""
        return explain(self._shared.config, self.recipe, self.layer_recipes, self.layers, self._reasons)

    @property
    def _own_options(self):
        """What the constructor takes besides a config and what a cache file holds."""
        return {}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if torch.compiler.is_compiling() or layer_idx >= len(self.layers):
            return self._update_untraced(key_states, value_states, layer_idx, *args, **kwargs)
        return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)

    @torch.compiler.disable
    def _update_untraced(self, key_states, value_states, layer_idx, *args, **kwargs):
        if layer_idx < len(self.layers):
            return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)
        self._shared.roll_back(self._shared.layers[-1].seen - key_states.shape[2] if self._shared.layers else 0)
        raise ValueError(
            f"past_key_values: got layer {layer_idx} of a model, takes one with {len(self.layers)} layers as in the "
            "config that the cache was made with"
        )

    @property
    def nbytes(self):
        """Bytes held by all layers, the library's own included: codes, scales, page slack, raw tokens, offsets."""
        return sum(layer.nbytes if isinstance(layer, Int4Layer) else tensor_bytes(vars(layer)) for layer in self.layers)

    def __deepcopy__(self, memo):
        other = copy.copy(self)
        # The config stays shared: it is how set_attn_implementation reaches the copy as well.
        other._shared = Shared(self._shared.config)
        other.layers = [
            layer.copy(other._shared) if isinstance(layer, Int4Layer) else copy.deepcopy(layer, memo)
            for layer in self.layers
        ]
        return other

    def save(self, path, model=None):
        """Writes the cache to a safetensors file: packed bytes as they are, raw tokens, offsets, recipe, model facts.

        model: adds a fingerprint of its weights, which load(model=...) checks. Raises ValueError for a cache without
        tokens or a path that can not be written (what was there before stays), NotImplementedError for a layer of the
        library that holds more than tensors and numbers, naming it.
        """
        from .save import save

        save(self, path, model)

    @classmethod
    def load(cls, path, config, model=None, **options):
        """The cache that save wrote, to go on from; every later step gives the bits that the saved one would give.

        config: the model's config, as for a new cache; options: other arguments of this class, such as max_cache_len of
        Int4StaticCache (a file fits either class). Raises ValueError if the file is missing, cut short, damaged,
        of another kind or version, or of another model, saying which.
        """
        from .save import load

        return load(cls, path, config, model, **options)

    def __reduce__(self):
        if self.get_seq_length() == 0:  # nothing to save but how it was made
            options = {"recipe": self.recipe, "layers": dict(enumerate(self.layer_recipes)), "prefill": self.prefill}
            options["calibration"] = next((layer.calibration for layer in self._shared.layers), None)
            return functools.partial(type(self), self._shared.config, **options, **self._own_options), ()
        from .save import from_bytes, to_bytes

        return from_bytes, (type(self), to_bytes(self), self._shared.config, self._own_options)

    def __copy__(self):
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other


def _check_calibration(calibration, recipes):
    """Raises unless `calibration` is what these recipes of layers need, and was made for them."""
    needs = next((need for need in map(needs_calibration, recipes) if need), None)
    if calibration is None:
        if needs:
            raise ValueError(
                f"calibration: got None, takes a halfbyte.calibrate.Calibration as the recipe uses {needs}"
            )
        return
    from .calibrate import Calibration

    if not isinstance(calibration, Calibration):
        raise ValueError(
            f"calibration: got a {type(calibration).__name__}, takes a halfbyte.calibrate.Calibration, such as "
            "Calibration.load(path) gives"
        )
    for recipe in recipes:
        if recipe.lambda_:
            calibration.check_recipe(recipe)
