"""A packed key-value cache for mlx-lm: Int4KVCache in place of its KVCache, for make_prompt_cache's callers.

    import halfbyte.mlx
    cache = halfbyte.mlx.make_prompt_cache(model)
    mlx_lm.generate(model, tokenizer, prompt, prompt_cache=cache)

The bytes are those of docs/format.md. Where MLX's default device is a GPU with Metal, the Metal kernels pack and attend
(halfbyte.mlx_layer); elsewhere, and for layers that those do not take, Halfbyte's CPU kernels on the arrays' own
memory. Tested with MLX's Linux build, the Metal kernels in an emulator there; not yet run on Apple hardware.
"""

from __future__ import annotations

import json
import sys

import mlx.core as mx
import mlx_lm.models.cache as library
import numpy as np

from . import _native, mlx_layer
from .recipes import fields_of, get_recipe

__all__ = ["Int4KVCache", "make_prompt_cache", "use_packed_attention"]

DTYPES = {mx.float32: "float32", mx.float16: "float16", mx.bfloat16: "bfloat16"}


class Int4KVCache:
    """The cache of one layer, with the protocol of mlx_lm.models.cache.KVCache.

    recipe, overrides: as of halfbyte.Int4Cache; those with lambda or a dense rotation need a calibration and are
    refused. layer_index: seeds the rotation. sliding_window: only so many tokens are ever attended to, 0 for all.
    packed: update_and_fetch returns handles that attention reads packed, which needs use_packed_attention(model);
    without it K and V are unpacked for every step, which is right and slow.

    Batches of prompts of different lengths (mlx_lm's merge, left padding) are not supported: there is no `merge`.
    Raises ValueError for values that are not finite (on a GPU when the next block is packed after them, and then the
    cache is lost), and for K and V of another shape or dtype than before.
    """

    def __init__(self, recipe="default", layer_index=0, sliding_window=0, packed=False, **overrides):
        self.recipe = get_recipe(recipe, **overrides)
        if self.recipe.lambda_ or self.recipe.rotation == "dense":
            raise ValueError("recipe: one with lambda or a dense rotation needs a calibration; takes the others")
        self.layer_index = layer_index
        self.sliding_window = sliding_window
        self.packed = packed
        self._layer = None
        self._dims = self._dtype = None

    @property
    def offset(self) -> int:
        """Tokens seen."""
        return 0 if self._layer is None else self._layer.length

    def update_and_fetch(self, keys, values):
        """Adds K, V [batch, kv_heads, tokens, head_dim]; returns all of K and V, or handles for attention."""
        self._admit(keys, values)
        start, tokens = self.offset, keys.shape[2]
        keys, values = mx.contiguous(keys), mx.contiguous(values)
        old = self._unpack(tokens) if start and not self.packed else None
        if tokens:
            self._layer.append(keys, values)
        if self.packed:
            return Packed(self, keys, start), Packed(self, values, start)
        if old is None:
            return keys, values
        return tuple(mx.concatenate([before, new], axis=2) for before, new in zip(old, (keys, values), strict=True))

    def _admit(self, keys, values):
        dims = (keys.shape[0], keys.shape[1], keys.shape[3], values.shape[3])
        if keys.shape[:3] != values.shape[:3] or keys.dtype != values.dtype:
            raise ValueError(
                f"values: got shape {list(values.shape)} and {values.dtype}, takes that of keys, {list(keys.shape)} "
                f"and {keys.dtype}, but for head_dim"
            )
        if self._layer is None:
            if keys.dtype not in DTYPES:
                raise ValueError(f"keys: got {keys.dtype}, takes one of {', '.join(map(str, DTYPES))}")
            self._dims, self._dtype = dims, keys.dtype
            self._layer = self._kind()(dims[0], **self._description())
        elif dims != self._dims or keys.dtype != self._dtype:
            form = "batch {}, kv_heads {}, head_dim {} and {}, {}"
            got, takes = form.format(*dims, keys.dtype), form.format(*self._dims, self._dtype)
            raise ValueError(f"keys: got {got}; the cache takes {takes}")

    def _kind(self):
        _, _, head_dim_k, head_dim_v = self._dims
        return CpuLayer if mlx_layer.why_not(head_dim_k, head_dim_v, self.recipe) else mlx_layer.MetalLayer

    def _description(self):
        _, kv_heads, head_dim_k, head_dim_v = self._dims
        sizes = {"kv_heads": kv_heads, "head_dim_k": head_dim_k, "head_dim_v": head_dim_v}
        more = {"layer_index": self.layer_index, "sliding_window": self.sliding_window}
        return sizes | more | {"dtype": DTYPES[self._dtype], "recipe": self.recipe}

    def _unpack(self, new_tokens):
        """What `new_tokens` more tokens may see of the cache, as K, V of the layer's dtype."""
        held = self._layer.visible
        return self._layer.unpack(min(held, self.sliding_window - 1) if self.sliding_window else held)

    def attend(self, queries, keys, values, scale, mask=None, sinks=None):
        """Attention of the newest tokens, whose raw K and V are given, on the packed cache; like queries in shape."""
        batch, _, count, _ = queries.shape
        if (batch, queries.shape[3], queries.dtype) != (self._dims[0], self._dims[2], self._dtype):
            raise ValueError(
                f"queries: got shape {list(queries.shape)} and {queries.dtype}, takes "
                f"[{self._dims[0]}, heads, tokens, {self._dims[2]}] and {self._dtype}"
            )
        shown = _broadcast_mask(mask, batch, count) if isinstance(mask, mx.array) else None
        logits = None if sinks is None else sinks.astype(mx.float32)
        return self._layer.attend(queries, (keys, values), scale, shown, logits)

    def make_mask(self, N, return_array=False, window_size=None):  # noqa: N803 (the library's name)
        """What N more tokens may see, as attention takes it: None, "causal" or a bool array."""
        window = self.sliding_window or window_size
        seen = min(self.offset, self.sliding_window - 1) if self.sliding_window else self.offset
        if window and (N > 1 or not self.sliding_window) and seen + N > window:
            return library.create_causal_mask(N, seen, window_size=window)
        return library.create_attention_mask(N, seen, return_array, None)

    def is_trimmable(self):
        """Whether trim can bring back the state before the newest tokens: not once a window has dropped some."""
        return not self.sliding_window or self.offset < self.sliding_window

    def trim(self, n):
        """Forgets the newest n tokens, all if there are fewer; returns how many. What was packed stays packed."""
        n = min(self.offset, n)
        if n == self.offset:
            self._layer = None
        elif n:
            self._layer.crop(self.offset - n)
        return n

    def size(self):
        return min(self.offset, self.sliding_window) if self.sliding_window else self.offset

    def empty(self):
        return self.offset == 0

    @property
    def nbytes(self):
        """Bytes held: packed pages with their slack, raw tokens, offsets."""
        return 0 if self._layer is None else self._layer.nbytes

    @property
    def state(self):
        """Arrays alone, so that any version of mlx_lm can evaluate and save them; `facts` is JSON text in bytes."""
        facts = {"recipe": fields_of(self.recipe)}
        facts |= {"layer_index": self.layer_index, "sliding_window": self.sliding_window, "packed": self.packed}
        arrays = {}
        if self._layer is not None:
            parts = self._layer.save()
            arrays = {
                name: mx.array(part) for name, part in parts.items() if isinstance(part, np.ndarray) and part.size
            }
            facts["counts"] = {name: part for name, part in parts.items() if not isinstance(part, np.ndarray)}
            facts |= {"dims": self._dims, "dtype": DTYPES[self._dtype]}
        return arrays | {"facts": mx.array(np.frombuffer(json.dumps(facts).encode(), np.uint8))}

    @state.setter
    def state(self, state):
        facts = json.loads(bytes(np.array(state["facts"])))
        self.__init__(get_recipe("default", **facts["recipe"]), facts["layer_index"], facts["sliding_window"])
        self.packed = facts["packed"]
        if "counts" not in facts:
            return
        self._dims = tuple(facts["dims"])
        self._dtype = next(dtype for dtype, name in DTYPES.items() if name == facts["dtype"])
        parts = {name: np.array(array) for name, array in state.items() if name != "facts"}
        self._layer = self._kind().load(parts | facts["counts"], **self._description())

    meta_state = property(lambda self: "", lambda self, text: None)  # of mlx_lm before 0.32: all is in `state`

    @classmethod
    def from_state(cls, state, meta_state=""):
        cache = cls.__new__(cls)
        cache.state = state
        return cache

    def __deepcopy__(self, memo):
        other = self.__class__.__new__(self.__class__)
        other.__dict__.update(self.__dict__)
        if self._layer is not None:
            other._layer = self._layer.copy()
        return other


class CpuLayer:
    """A layer in Halfbyte's CPU kernels, as mlx_layer.MetalLayer; each call waits for what MLX does before it."""

    def __init__(self, batch, **config):
        self.config, self._native = config, _native.Layer(**config)
        self.batch, self.dtype = batch, getattr(mx, config["dtype"])

    length = property(lambda self: self._native.length)
    visible = property(lambda self: self._native.visible)
    nbytes = property(lambda self: self._native.nbytes)

    def append(self, keys, values):
        k, v = _Rows(keys), _Rows(values)
        self._native.append(k.address, v.address, keys.shape[0], keys.shape[2], k.strides, v.strides)

    def unpack(self, tokens):
        held, dims = self.visible, (self.config["head_dim_k"], self.config["head_dim_v"])
        parts = [np.empty((self.batch, self.config["kv_heads"], held, dim), np.float32) for dim in dims]
        if held:
            self._native.dequantize(*(part.ctypes.data for part in parts))
        return [mx.array(part[:, :, held - tokens :]).astype(self.dtype) for part in parts]

    def attend(self, queries, chunk, scale, mask=None, sinks=None):
        batch, heads, count, _ = queries.shape
        out = np.empty((batch, heads, count, self.config["head_dim_v"]), _numpy_dtype(self.dtype))
        options = {}
        if count > 1:
            k, v = (_Rows(x) for x in chunk)
            options.update(chunk_k=k.address, chunk_v=v.address, chunk_k_strides=k.strides, chunk_v_strides=v.strides)
        if mask is not None:
            shown = np.array(mask)
            options.update(mask=shown.ctypes.data, mask_tokens=shown.shape[2])
            options["mask_strides"] = shown.shape[1] * shown.shape[2], shown.shape[2]
        if sinks is not None:
            logits = np.array(sinks)
            options["sinks"] = logits.ctypes.data
        q = _Rows(queries)
        strides = tuple(step // out.itemsize for step in out.strides[:3])
        self._native.attend(q.address, out.ctypes.data, heads, count, q.strides, strides, scale, **options)
        return mx.array(out).view(self.dtype)

    def crop(self, length):
        self._native.crop(length)

    def save(self):
        return self._native.save()

    @classmethod
    def load(cls, parts, **config):
        layer = cls(parts["batch"], **config)
        layer._native = _native.Layer.load(**config, parts=parts)
        return layer

    def copy(self):
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, _native=self._native.copy())
        return other


class Packed:
    """Stands for the K or the V that update_and_fetch returns of a packed cache; attention takes it from here."""

    def __init__(self, cache, new, start):
        self.cache = cache
        self.new = new  # [batch, kv_heads, new tokens, head_dim]
        self.start = start  # tokens seen before
        self.dtype = new.dtype

    @property
    def shape(self):
        batch, kv_heads, tokens, head_dim = self.new.shape
        window = self.cache.sliding_window
        return batch, kv_heads, (min(self.start, window - 1) if window else self.start) + tokens, head_dim


class _Rows:
    """Address and strides of an array whose last dimension lies in one piece; keeps it alive."""

    def __init__(self, array):
        array = mx.contiguous(array)
        self.held = np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array, copy=False)
        self.address = self.held.ctypes.data
        self.strides = tuple(step // self.held.itemsize for step in self.held.strides[:3])


def _numpy_dtype(dtype):
    """NumPy has no bfloat16: its bits travel as uint16."""
    return {mx.float32: np.float32, mx.float16: np.float16, mx.bfloat16: np.uint16}[dtype]


def _broadcast_mask(mask, batch, count):
    """A bool mask as uint8 [batch, queries, tokens]; NotImplementedError for what differs between heads or adds."""
    if mask.dtype != mx.bool_:
        raise NotImplementedError("mask: got one that adds to scores; a packed cache takes bool masks, or packed=False")
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    if mask.shape[1] != 1:
        raise NotImplementedError("mask: got one that differs between heads; a packed cache takes packed=False for it")
    return mx.broadcast_to(mask[:, 0], (batch, count, mask.shape[3])).astype(mx.uint8)


def _attention(plain):
    """The library's scaled_dot_product_attention, with packed caches attended packed."""

    def attention(queries, keys, values, cache, scale, mask, sinks=None):
        if not isinstance(keys, Packed):
            return plain(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
        if keys.start == 0:  # a first prefill attends to its own raw K and V
            return plain(queries, keys.new, values.new, cache=None, scale=scale, mask=mask, sinks=sinks)
        return keys.cache.attend(queries, keys.new, values.new, scale, mask, sinks)

    attention.packs = True
    return attention


def use_packed_attention(model) -> None:
    """Lets the modules of an mlx_lm model attend to packed caches without unpacking them.

    It replaces the name scaled_dot_product_attention in the modules that define the model's classes. Other caches are
    attended as before. Raises ValueError if none of these modules has that name.
    """
    names = {type(part).__module__ for _, part in model.named_modules()}
    modules = [sys.modules[name] for name in names if hasattr(sys.modules[name], "scaled_dot_product_attention")]
    if not modules:
        raise ValueError("model: its modules do not use mlx_lm's scaled_dot_product_attention; use packed=False")
    for module in modules:
        plain = module.scaled_dot_product_attention
        if not getattr(plain, "packs", False):
            module.scaled_dot_product_attention = _attention(plain)


def make_prompt_cache(model, recipe="default", packed=True, **overrides) -> list:
    """Caches for mlx_lm.generate(prompt_cache=...): packed where a layer has K and V, the model's own elsewhere.

    Full layers and sliding windows are packed; states of recurrent layers and windows that keep their first tokens stay
    the library's own. packed=True calls use_packed_attention(model).
    """
    if packed:
        use_packed_attention(model)
    caches = library.make_prompt_cache(model)
    for index, cache in enumerate(caches):
        window = getattr(cache, "max_size", 0)
        if type(cache) is library.KVCache or (type(cache) is library.RotatingKVCache and cache.keep == 0):
            caches[index] = Int4KVCache(recipe, index, window, packed, **overrides)
    return caches


library.Int4KVCache = Int4KVCache  # load_prompt_cache looks classes up there by name
