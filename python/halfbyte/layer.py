"""Int4Layer: what Int4Cache holds of one attention layer, and the layer interface that transformers expects of it."""

import copy

import torch
from transformers.cache_utils import CacheLayerMixin

from .attention import States, Step
from .offset import bias_offset
from .rooms import append_native, attend_native, make_room, unpack_native
from .shared import Shared, alike, check_against_config, tensor_bytes

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
OFFSET_TOKENS = 16  # a shorter first prefill gives no mean worth having


class Int4Layer(CacheLayerMixin):
    """The cache of one attention layer, full or sliding: packed blocks, with the newest tokens raw.

    `keys` and `values` unpack to tensors [batch, kv_heads, tokens, head_dim] of the model's dtype (slow); assigning
    both packs them anew. Under attn_implementation="halfbyte", `update` returns handles that attention reads packed.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, recipe, layer_idx, shared, sliding_window=0, calibration=None, consistent=False):
        self.recipe = recipe
        self.layer_idx = layer_idx
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window > 0
        self.calibration = calibration
        self.consistent = consistent  # every token is treated by its position alone: see Int4Cache, prefill
        self.record_past = False
        self.drift = None  # a DriftMonitor, on the layer that has one
        self._shared = shared
        shared.layers.append(self)
        self._clear()

    def _clear(self):
        self.native = None
        self.is_initialized = False
        self.seen = 0  # tokens, staged ones included
        self._staged = None  # the Step of a first prefill, or of one token, that attention has not read yet
        self._assigned = {}  # "keys", "values": tensors assigned and not yet packed
        self._k_shape = self._v_shape = self._q_shape = None
        self.batch, self.dtype, self.device = 0, None, None
        self._on_cpu, self._steps = True, False  # _steps: `native.step` adds a token and attends

    def lazy_initialization(self, key_states, value_states):
        if key_states.dtype not in DTYPES:
            raise ValueError(f"key_states: got {key_states.dtype}, takes one of {[str(dtype) for dtype in DTYPES]}")
        batch, kv_heads, _, dim_k = key_states.shape
        dim_v = value_states.shape[-1]
        check_against_config(self._shared.config, self.layer_idx, kv_heads, dim_k)
        native = self._make_room(key_states.device, kv_heads, dim_k, dim_v, key_states.dtype)
        native.record_past(self.record_past)
        self._calibrate(native, kv_heads, dim_k, dim_v)
        self.native = native
        self._set_batch(batch)
        self.is_initialized = True

    def _make_room(self, device, kv_heads, dim_k, dim_v, dtype, parts=None):
        """See rooms.make_room."""
        native = make_room(
            device,
            self.consistent,
            parts,
            kv_heads=kv_heads,
            head_dim_k=dim_k,
            head_dim_v=dim_v,
            dtype=DTYPES[dtype],
            recipe=self.recipe,
            layer_index=self.layer_idx,
            sliding_window=self.sliding_window,
        )
        self.dtype, self.device, self._on_cpu = dtype, device, device.type == "cpu"
        self._steps = not self.consistent and getattr(native, "takes_new", False)
        self.kv_heads, self.head_dim_k, self.head_dim_v = kv_heads, dim_k, dim_v
        rope = self.rope(dim_k) if parts is None else None
        self._turns = rope is not None
        if rope is not None:
            native.set_frequencies(rope.frequencies.data_ptr(), rope.frequencies.numel(), rope.interleaved)
        elif parts is not None:
            self._turns = len(parts.get("frequencies", ())) > 0
        return native

    def _move(self, device):
        """Takes the codes to another device, as they are."""
        if self._staged is not None or self._assigned:
            self._settle()
        parts = self.native.save() if self.seen else None
        recorded = self.record_past
        self.native = self._make_room(device, self.kv_heads, self.head_dim_k, self.head_dim_v, self.dtype, parts)
        self.native.record_past(recorded)
        if parts is None:
            self._calibrate(self.native, self.kv_heads, self.head_dim_k, self.head_dim_v)

    def rope(self, head_dim):
        """The Rope that this layer's offset follows, or None: none wanted, a fixed one, or keys that do not turn."""
        recipe, given = self.recipe, self.calibration
        fixed = not recipe.offset or not recipe.offset_span or (getattr(given, "offset_k", None) and not given.turns)
        return None if fixed else self._shared.rope(self, head_dim)

    def turns(self, head_dim):
        """Whether this layer's offset turns, or will once tokens come."""
        return self._turns if self.is_initialized else self.rope(head_dim) is not None

    def _calibrate(self, native, kv_heads, dim_k, dim_v):
        if self.calibration is None:
            return
        for name, wanted, setter in (
            ("offset", self.recipe.offset, native.set_offset),
            ("lambda", self.recipe.lambda_, native.set_lambda),
            ("rotation", self.recipe.rotation == "dense", native.set_rotation),
        ):
            if not wanted:
                continue
            addresses, kept = [], []
            for part, dim in (("k", dim_k), ("v", dim_v)):
                tensors = getattr(self.calibration, f"{name}_{part}", None)
                if not tensors:
                    addresses.append(0)
                    continue
                if len(tensors) <= self.layer_idx:
                    raise ValueError(f"calibration: got {len(tensors)} layers, takes those of the model")
                tensor = torch.as_tensor(tensors[self.layer_idx], dtype=torch.float32, device="cpu").contiguous()
                shape = [dim if name == "rotation" else kv_heads, dim]
                if list(tensor.shape) != shape:
                    raise ValueError(
                        f"calibration: {name}_{part} of layer {self.layer_idx} has shape {list(tensor.shape)}, "
                        f"takes {shape}"
                    )
                kept.append(tensor)
                addresses.append(tensor.data_ptr())
            if kept:
                setter(*addresses)

    def _set_batch(self, batch):
        self.batch = batch
        # What one decoding step brings; anything else is looked at closely.
        self._k_shape = torch.Size((batch, self.kv_heads, 1, self.head_dim_k))
        self._v_shape = torch.Size((batch, self.kv_heads, 1, self.head_dim_v))
        self._q_shape = None

    def update(self, key_states, value_states, *args, **kwargs):
        """Adds K, V [batch, kv_heads, tokens, head_dim]; returns handles for attention, or all of K and V unpacked.

        The unpacked ones hold packed values for blocks complete before these tokens, raw ones after. Raises ValueError,
        with the whole cache as before the forward pass, if a value is not finite or the shape or dtype is another than
        the layer's. On a CUDA device values are checked without waiting, and one that is not finite raises in a later
        step. States on another device than before take the codes there.
        """
        shared = self._shared
        if self._staged is not None or self._assigned:
            self._settle()
        if shared.layers[0] is self:
            shared.begin_forward(self)
        start = self.seen
        try:
            if (
                key_states.shape != self._k_shape
                or value_states.shape != self._v_shape
                or key_states.dtype is not self.dtype
                or value_states.dtype is not self.dtype
                or type(key_states) is not torch.Tensor
                or key_states.device != self.device
            ):
                key_states, value_states = self._admit(key_states, value_states)
            step = Step(self, key_states, value_states, start)
            if shared.packed:
                one_by_one = self._steps and step.length == start + 1  # attention adds the token as well
                if start and not one_by_one and not self._waits_for_offset:
                    self._append(key_states, value_states)
                else:
                    self._staged = step
                    self.seen = step.length
                return States(step, 0), States(step, 1)
            if self.consistent:
                raise ValueError('prefill="consistent": takes a model with set_attn_implementation("halfbyte")')
            tensors = key_states, value_states
            if start:
                old = self._unpack(step.tokens - key_states.shape[2])
                tensors = tuple(torch.cat(pair, dim=2) for pair in zip(old, tensors, strict=True))
            # A later pass that fails goes back to its start, whose window must still be there.
            self._append(key_states, value_states, answered=start == 0)
        except (ValueError, RuntimeError, MemoryError):
            self._fail(start)
            raise
        tensors[0].halfbyte_shared = shared
        return tensors

    def _admit(self, k, v):
        """K and V as this layer takes them, which the first ones initialise; raises for others."""
        where = f"layer {self.layer_idx}"
        if _is_traced(k):
            raise NotImplementedError(f"{where}: torch.compile and torch.export can not trace Int4Cache: run eagerly")
        if k.device != v.device:
            raise ValueError(f"{where}: value_states: got {v.device}, takes {k.device} as key_states")
        if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3]:
            raise ValueError(
                f"{where}: key_states and value_states: got shapes {list(k.shape)} and {list(v.shape)}, "
                "takes [batch, kv_heads, tokens, head_dim], alike but for head_dim"
            )
        v = alike(where, k, v)
        if not self.is_initialized:
            try:
                self.lazy_initialization(k, v)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            return k, v
        if k.device != self.device:
            self._move(k.device)
        if self.seen == 0 and self.batch != k.shape[0]:
            self._set_batch(k.shape[0])
        got = (k.shape[0], k.shape[1], k.shape[3], v.shape[3], k.dtype)
        takes = (self.batch, self.kv_heads, self.head_dim_k, self.head_dim_v, self.dtype)
        if got != takes:
            form = "batch {}, kv_heads {}, head_dim {} in K and {} in V, {}"
            raise ValueError(f"{where}: key_states: got {form.format(*got)}, the cache takes {form.format(*takes)}")
        return k, v

    def restore(self, facts, dtype, parts):
        """Takes over saved content. facts: kv_heads, head sizes and tokens seen; parts: what native.save() gave."""
        sizes = (facts[name] for name in ("kv_heads", "head_dim_k", "head_dim_v"))
        self.native = self._make_room(torch.device("cpu"), *sizes, dtype, parts)
        self._set_batch(self.native.batch)
        self.seen = facts["seen"]
        self.is_initialized = True

    def _append(self, k, v, counted=None, answered=False):
        """counted: uint8 [batch, tokens], 0 for padding, which the offset leaves out; None: all count.

        answered: no query of these tokens will read them from here: a sliding layer keeps what later ones see.
        """
        tokens = k.shape[2]
        if tokens == 0:
            return
        try:
            if self._on_cpu:
                append_native(self.native, k, v, counted, answered)
            else:
                self.native.append(k, v, counted, answered)
        except ValueError as error:
            raise ValueError(f"layer {self.layer_idx}: {error}") from None
        self.seen += tokens

    def _fail(self, start):
        """Leaves the cache as it was before a forward pass that went wrong in this layer."""
        if start == 0:
            self._clear()
        self._shared.roll_back(start)

    def commit(self, step, mask, module):
        """Packs a staged step: attention has read it, or knows which of its tokens are padding by now.

        mask: as attention got it; module: its caller.
        """
        if self._staged is not step:
            return  # another layer has attended the same states before
        counted = None
        if mask is not None:
            # Causal or windowed, a token sees itself unless it is padding.
            shown = mask if mask.dtype is torch.bool else mask == 0
            old = shown.shape[3] - shown.shape[2]
            if shown.shape[2] == step.k.shape[2]:
                counted = shown[:, 0].diagonal(old, 1, 2).expand(self.batch, -1).to(torch.uint8).contiguous()
        self._flush(counted, module)

    def _flush(self, counted=None, module=None):
        step, self._staged = self._staged, None
        self.seen = step.start
        short = step.length < OFFSET_TOKENS and not self.consistent
        try:
            if module is not None and short and self.recipe.offset and not getattr(self.calibration, "offset_k", None):
                span = self.recipe.offset_span if self._turns else 0
                offset = bias_offset(module, self._shared, self.kv_heads, self.head_dim_k, span)
                if offset is not None:
                    self.native.set_offset(offset.data_ptr(), 0)
            # A first prefill is attended as raw states.
            answered = step.start == 0 and not self.consistent
            self._append(step.k.detach(), step.v.detach(), counted, answered)
        except (ValueError, RuntimeError, MemoryError):
            self._fail(step.start)
            raise

    @property
    def _waits_for_offset(self):
        """Whether tokens still go into the offset, so that attention must say first which are padding."""
        return self.consistent and self.recipe.offset and not self.native.has_offset

    def _settle(self):
        """Packs what is staged or assigned, so that the native layer holds all there is."""
        if self._staged is not None:
            self._flush()
        if self._assigned:
            k, v = self.keys, self.values
            if k is None or v is None or k.shape[:3] != v.shape[:3] or k.dtype != v.dtype:
                raise RuntimeError(
                    f"layer {self.layer_idx}: of keys and values one was assigned that does not fit the other"
                )
            gone = self.seen - self._held()  # fell out of the window
            self._clear()
            self._admit(k, v)
            self._append(k, v)
            self.seen += gone

    def attend(self, step, query, mask, scaling, softcap, s_aux):
        """Attention of the newest tokens on the packed layer, as [batch, queries, heads, head_dim_v]."""
        if step.length != self.seen:
            raise RuntimeError(
                f"layer {self.layer_idx}: these K, V stand for {step.length} tokens and the cache now holds {self.seen}"
            )
        batch, heads, queries, head_dim = shape = query.shape
        if shape != self._q_shape or query.dtype is not self.dtype:
            fits = batch == self.batch and heads % self.kv_heads == 0 and head_dim == self.head_dim_k
            if not fits or query.dtype is not self.dtype:
                raise ValueError(
                    f"layer {self.layer_idx}: query: got shape {list(shape)} and {query.dtype}, takes "
                    f"[{self.batch}, a multiple of {self.kv_heads}, queries, {self.head_dim_k}] and {self.dtype}"
                )
            self._q_shape = shape
        if self.drift is not None:
            if self._staged is step:
                self._flush()
            self.drift.observe(self, query, step, scaling)
        out = query.new_empty(batch, queries, heads, self.head_dim_v)
        chunk = None
        if queries > 1:
            newest = (x[:, :, -queries:] for x in (step.k, step.v))
            chunk = [x if x.stride(3) == 1 else x.contiguous() for x in newest]
        if mask is not None:
            if mask.stride(3) != 1:
                mask = mask.contiguous()
            mask = mask.expand(batch, 1, queries, -1)
        sinks = None if s_aux is None else s_aux.detach().float().contiguous()
        arguments = query, out, scaling if scaling is not None else head_dim**-0.5, chunk, mask, softcap or 0.0, sinks
        if self._staged is step:
            self._staged, self.seen = None, step.start
            try:
                self.native.step(step.k, step.v, *arguments)
            except (ValueError, RuntimeError, MemoryError) as error:
                self._fail(step.start)
                raise type(error)(f"layer {self.layer_idx}: {error}") from None
            self.seen = step.length
            return out
        exact = {"exact": True} if self.consistent else {}
        if self._on_cpu:
            attend_native(self.native, *arguments, **exact)
        else:
            self.native.attend(*arguments, **exact)
        return out

    def _unpack(self, tokens):
        """The newest `tokens` tokens as K, V [batch, kv_heads, tokens, head_dim] of the layer's dtype."""
        if not self._on_cpu:
            return self.native.unpack(tokens, self.dtype)
        return unpack_native(self.native, (self.head_dim_k, self.head_dim_v), self.kv_heads, tokens, self.dtype)

    def unpack(self, step):
        """K and V as `step`'s queries see them, its own tokens raw."""
        if step.length != self.seen:
            raise RuntimeError(
                f"layer {self.layer_idx}: these K, V stand for {step.length} tokens and the cache now holds {self.seen}"
            )
        if self._staged is step:
            self._flush()
        pairs = zip(self._unpack(step.tokens), (step.k, step.v), strict=True)
        return tuple(torch.cat([old[:, :, : old.shape[2] - new.shape[2]], new], dim=2) for old, new in pairs)

    def _get(self, name):
        if name in self._assigned:
            return self._assigned[name]
        if self._staged is not None and self._staged.start:
            self._flush()
        if not self.is_initialized:
            return None
        part = 0 if name == "keys" else 1
        held = self._held()
        if self._staged is not None:
            return (self._staged.k, self._staged.v)[part][:, :, self._staged.length - held :]
        return self._unpack(held)[part]

    def _held(self):
        """How many tokens `keys` and `values` have: those a later query may still see."""
        if not self.is_initialized:
            return 0
        held = self.native.visible if self._staged is None else self._staged.length
        return min(held, self.sliding_window - 1) if self.is_sliding and not self.record_past else held

    def _set(self, name, tensor):
        if self._staged is not None:
            self._flush()
        if tensor is None:
            self._clear()
            return
        self._assigned[name] = tensor
        if len(self._assigned) == 2:
            self._settle()

    keys = property(lambda self: self._get("keys"), lambda self, tensor: self._set("keys", tensor))
    values = property(lambda self: self._get("values"), lambda self, tensor: self._set("values", tensor))

    @property
    def nbytes(self):
        """Bytes held: packed pages with their slack, raw tokens, offsets, and anything staged."""
        staged = [] if self._staged is None else [self._staged.k, self._staged.v]
        return (self.native.nbytes if self.native is not None else 0) + tensor_bytes([*staged, self._assigned])

    def get_seq_length(self):
        return self.seen

    def get_max_length(self):
        return self.sliding_window or -1

    def get_mask_sizes(self, query_length):
        """(tokens, position of the first one) that the next `query_length` queries are shown."""
        if not self.is_sliding:
            return self.seen + query_length, 0
        return min(self.seen, self.sliding_window - 1) + query_length, max(self.seen - self.sliding_window + 1, 0)

    def activate_past_recording(self):
        """From now on crop can bring back what the newest step pushed out of a window, and what it packed, raw."""
        self.record_past = True
        if self.native is not None:
            self.native.record_past(True)

    def crop(self, tokens_to_remove):
        """Forgets the newest -tokens_to_remove tokens; a positive number is the length to keep (the older form)."""
        count = int(tokens_to_remove)
        if not self.is_initialized:
            return
        remove = max(self.seen - count, 0) if count > 0 else -count
        self._settle()
        if self.is_sliding and remove and self.seen >= self.sliding_window and not self.record_past:
            raise RuntimeError(
                f"layer {self.layer_idx}: crop({count}): tokens that fell out of the sliding window are gone; "
                "call activate_past_recording() on the cache before adding the tokens to remove"
            )
        self.forget(remove)

    def forget(self, remove):
        if remove >= self.seen:
            self._clear()
            return
        self._settle()
        self.native.crop(self.native.length - remove)
        self.seen -= remove

    def _select(self, rows):
        if not self.is_initialized or self.seen == 0:
            return
        if not rows or not all(type(row) is int and 0 <= row < self.batch for row in rows):
            raise ValueError(f"layer {self.layer_idx}: got sequences {rows}, takes some of 0 to {self.batch - 1}")
        self._settle()
        self.native.select(rows)
        self._set_batch(len(rows))

    def reorder_cache(self, beam_idx):
        self._select(torch.as_tensor(beam_idx, device="cpu").tolist())

    def batch_repeat_interleave(self, repeats):
        self._select([row for row in range(self.batch) for _ in range(repeats)])

    def batch_select_indices(self, indices):
        indices = torch.as_tensor(indices, device="cpu")
        self._select(torch.arange(self.batch, device="cpu")[indices].tolist())

    def reset(self):
        self._clear()

    def offload(self):
        """Nothing to move: codes stay on the device whose states they were made from."""

    prefetch = offload

    def copy(self, shared):
        """A layer of its own for another cache; packed pages are shared until either writes to them."""
        other = copy.copy(self)
        other._shared = shared
        shared.layers.append(other)
        other._assigned = dict(self._assigned)
        other.drift = copy.deepcopy(self.drift)
        if self.native is not None:
            other.native = self.native.copy()
        if self._staged is not None:
            other._staged = Step(other, self._staged.k, self._staged.v, self._staged.start)
        return other

    def __deepcopy__(self, memo):
        return self.copy(Shared(self._shared.config))


def _is_traced(tensor):
    """Whether there are no values behind it; torch.export and torch.compile pass such tensors."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor) or tensor.is_meta
