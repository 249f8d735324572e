"""Int4StaticCache: a fixed capacity, lengths in tensors, and custom operators, for torch.compile and CUDA graphs."""

import contextlib
import functools
import itertools
import weakref
from types import SimpleNamespace

import torch
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING

from .attention import Pending, States, Step, check_options, halfbyte_attention
from .cuda_kernels import CudaKernels
from .cuda_step import step, tokens_seen
from .hf import Int4Cache
from .layer import Int4Layer
from .shared import alike
from .static_cuda import StaticRoom

_layers = weakref.WeakValueDictionary()  # number -> layer: what the operator's `state` tensor names
_numbers = itertools.count()


def _no_kernels(device):
    return (
        f"Int4StaticCache: key_states on {device}: takes CPU tensors, or CUDA tensors where there are kernels "
        "(see `halfbyte doctor`) for the recipe; Int4Cache works anywhere"
    )


def _on_host(method):
    """Of a layer on CUDA: runs where the GpuLayer has the content, and tells the device of what it changed."""

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        with self.editing():
            return method(self, *args, **kwargs)

    return wrapped


class Int4StaticLayer(Int4Layer):
    """An Int4Layer for up to `max_cache_len` tokens whose pages are allocated when the first states arrive.

    On the CPU, `state`: int64 [2] = (number of this layer, tokens seen); `update` advances it, so that traced code
    never reads the layer itself. A step names the state it starts from: run again, it takes the layer back to there
    first. On CUDA, `room` has the storage of steps of one token, whose kernels find and move on the length on the
    device; anything else waits for the device and is done as by any Int4Layer.
    """

    is_compileable = True

    def __init__(self, *args, max_cache_len, **kwargs):
        self.max_cache_len = max_cache_len
        self.number = next(_numbers)
        self.state = torch.tensor([self.number, 0], device="cpu")
        self.room = None  # a StaticRoom, on CUDA
        self.fresh = True  # no token has come
        super().__init__(*args, **kwargs)
        _layers[self.number] = self

    def _clear(self):
        self.fresh = True
        if getattr(self, "native", None) is None:
            super()._clear()
        else:  # keeps the pages for the next sequences
            if self.room is None:
                self.native.reset()
            else:
                self.room.reset()
            self._staged, self._assigned = None, {}
            self.seen = 0
        self._write_length()

    def _write_length(self):
        self.state[1] = self.seen

    def lazy_initialization(self, key_states, value_states):
        super().lazy_initialization(key_states, value_states)
        if self._on_cpu:
            self.native.reserve(key_states.shape[0], self.max_cache_len)

    def _set_batch(self, batch):
        super()._set_batch(batch)
        if not self._on_cpu:
            self._open_room(batch)

    def _move(self, device):
        self.look()
        super()._move(device)
        self.room = None
        self._write_length()
        if not self._on_cpu:
            self._open_room(self.batch)

    def _open_room(self, batch):
        if self.room is not None:
            self.room.fit(batch)
            return
        if not isinstance(getattr(self.native, "kernels", None), CudaKernels):
            raise NotImplementedError(_no_kernels(self.device))
        self.room = StaticRoom(self.native, self.max_cache_len, batch)
        self.fresh = self.seen == 0

    # ------------------------------------------------------------------------------------------------ host and device

    def look(self):
        """Brings what the host knows of a layer on CUDA to where its steps have come; waits for the device."""
        if self.room is not None and not self.room.edited:
            self.seen = self.room.look()
            self.fresh = self.seen == 0

    @contextlib.contextmanager
    def editing(self):
        """See _on_host."""
        if self.room is None:
            yield
            return
        self.look()
        with self.room.editing():
            try:
                yield
            finally:
                self.fresh = self.seen == 0

    crop = _on_host(Int4Layer.crop)
    _select = _on_host(Int4Layer._select)
    _set = _on_host(Int4Layer._set)

    def _settle(self):
        self.look()
        super()._settle()

    def _get(self, name):
        self.look()
        return super()._get(name)

    def activate_past_recording(self):
        with self.editing():
            super().activate_past_recording()

    @property
    def nbytes(self):
        return super().nbytes if self.room is None else self.room.nbytes

    def restore(self, facts, dtype, parts):
        super().restore(facts, dtype, parts)
        self.native.reserve(self.batch, max(self.max_cache_len - self.seen, 0))
        self._write_length()

    @_on_host
    def forget(self, remove):
        super().forget(remove)
        self._write_length()

    # ------------------------------------------------------------------------------------------------ steps

    def append_and_attend(self, query, key, value, mask, length, causal, scaling, softcap, sinks, append):
        """What the operator does, on values: [batch, queries, heads, head_dim_v]."""
        tokens = key.shape[2]
        if append:
            keys, values = self._append_at(length, key, value)
        else:
            step = Step(self, key, value, self.seen - tokens)
            keys, values = States(step, 0), States(step, 1)
        if mask is not None:  # columns of the capacity, but for a first prefill's: those this step can see
            mask = mask[..., self.seen - keys.step.tokens : self.seen]
        module = SimpleNamespace(
            is_causal=causal, num_key_value_groups=query.shape[1] // self.kv_heads, config=self._shared.config
        )
        out, _ = halfbyte_attention(
            module, query, keys, values, mask, scaling=scaling, is_causal=causal, softcap=softcap, s_aux=sinks
        )
        return out

    def _append_at(self, length, key, value):
        try:
            if length + key.shape[2] > self.max_cache_len:
                raise ValueError(
                    f"layer {self.layer_idx}: {length} tokens and {key.shape[2]} more exceed "
                    f"max_cache_len={self.max_cache_len}"
                )
            if self.seen < length:
                raise RuntimeError(f"layer {self.layer_idx}: holds {self.seen} tokens, its state says {length}")
            if self.seen > length:
                super().forget(self.seen - length)
            return super().update(key, value)
        except (ValueError, RuntimeError, MemoryError):
            self._shared.roll_back(length)
            self._write_length()  # `update` counted the tokens already
            raise

    def update(self, key_states, value_states, *args, **kwargs):
        """Returns handles for attention, which appends the states: nothing is stored before it runs."""
        if self._shared.config._attn_implementation != "halfbyte":
            raise ValueError('Int4StaticCache: takes a model with set_attn_implementation("halfbyte")')
        value_states = alike(f"layer {self.layer_idx}", key_states, value_states)
        if not self.is_initialized or key_states.device != self.device:
            if key_states.device.type not in ("cpu", "cuda"):
                raise NotImplementedError(_no_kernels(key_states.device))
            self._admit(key_states, value_states)
        if self.room is not None:
            pending = Pending(self, None, key_states, value_states)
            return pending, pending
        pending = Pending(self, self.state.clone(), key_states, value_states)
        self.state[1] += key_states.shape[2]
        return pending, pending

    def attend_on_cuda(self, query, key, value, mask, causal, scaling, softcap, sinks, append):
        """[batch, queries, heads, head_dim_v]; a step of one token by the device alone, others by way of the host."""
        compiling = torch.compiler.is_compiling()
        if query.shape[2] == key.shape[2] == 1 and (compiling or not self.fresh):
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            storage, plan = self.room.storage, self.room.plan.key
            return step(query, key, value, mask, sinks, *storage, plan, scaling, softcap or 0.0, append)
        if compiling:
            raise NotImplementedError(
                f"Int4StaticCache on CUDA: a compiled step has {key.shape[2]} tokens, takes one; run prefills eagerly"
            )
        if append and self._shared.layers[0] is self:
            for layer in self._shared.layers:  # they have to agree on the length
                layer.look()
        with self.editing():
            arguments = query, key, value, mask, self.seen, causal, scaling, softcap, sinks, append
            return self.append_and_attend(*arguments)

    def get_seq_length(self):
        if self.room is not None:
            return tokens_seen(self.room.state)
        return self.state[1] if self.is_initialized else 0

    def get_max_length(self):
        return self.max_cache_len

    def get_mask_sizes(self, query_length):
        # A prompt is masked as in an Int4Cache: columns for the whole room would make models with a shorter window mask
        # what needs no mask, and PyTorch's attention take another kernel, whose bits differ.
        if query_length > 1 and not torch.compiler.is_compiling() and not self.seen:
            return super().get_mask_sizes(query_length)
        return self.max_cache_len, 0

    def copy(self, shared):
        self.look()
        other = super().copy(shared)
        if self.room is not None:
            other.room = None
            other._open_room(other.batch)
        other.number = next(_numbers)
        other.state = torch.tensor([other.number, self.seen], device="cpu")
        _layers[other.number] = other
        return other


class Int4StaticCache(Int4Cache):
    """Int4Cache with room for `max_cache_len` tokens, for torch.compile(model, fullgraph=True) and generate().

    Takes what Int4Cache takes. Pages are allocated at once, when the first states arrive; more tokens than
    `max_cache_len` raise ValueError. Only attn_implementation="halfbyte" reads it. Compile decoding steps and run the
    prefill eagerly, as `generate` does, or call early_initialization first.
    """

    def __init__(self, config, max_cache_len, recipe="default", calibration=None, prefill="exact", **overrides):
        if not isinstance(max_cache_len, int) or max_cache_len < 1:
            raise ValueError(f"max_cache_len: got {max_cache_len!r}, takes a positive number of tokens")
        self._capacity = max_cache_len  # not max_cache_len: a property of Cache before transformers 5.20
        super().__init__(config, recipe, calibration, prefill, **overrides)

    def _make_packed_layer(self, *args):
        return Int4StaticLayer(*args, max_cache_len=self._capacity)

    def _make_library_layer(self, kind, options):
        return STATIC_LAYER_TYPE_MAPPING[kind](max_cache_len=self._capacity, **options)

    @property
    def _own_options(self):
        return {"max_cache_len": self._capacity}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if layer_idx >= len(self.layers):
            return self._update_untraced(key_states, value_states, layer_idx)
        return self.layers[layer_idx].update(key_states, value_states)


# Nothing is declared as mutated: codes are not tensors, and what a call stores follows from its arguments alone.
@torch.library.custom_op("halfbyte::append_and_attend", mutates_args=(), device_types="cpu")
def append_and_attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    state: torch.Tensor,
    causal: bool,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    append: bool,
) -> torch.Tensor:
    """Appends K, V [batch, kv_heads, tokens, head_dim] at the state (layer, length) and attends query to the layer.

    query: [batch, heads, tokens, head_dim]; mask: bool [batch or 1, 1, tokens, max_cache_len] (of a first prefill,
    the columns of its own tokens suffice) or None; append=False attends again to states that are in the layer already.
    Returns [batch, tokens, heads, head_dim_v].
    """
    number, length = state.tolist()
    layer = _layers.get(number)
    if layer is None:
        raise RuntimeError("halfbyte::append_and_attend: the cache of these states is gone")
    return layer.append_and_attend(query, key, value, mask, length, causal, scaling, softcap, sinks, append)


@append_and_attend.register_fake
def _(query, key, value, mask, state, causal, scaling, softcap, sinks, append):
    batch, heads, queries, _ = query.shape
    return query.new_empty(batch, queries, heads, value.shape[-1])


def attend_pending(module, query, pending, _, mask, scaling=None, is_causal=None, softcap=None, s_aux=None, **kwargs):
    """attn_implementation="halfbyte" on what Int4StaticCache.update returned."""
    check_options(module, kwargs)
    for name in ("dropout", "position_bias"):
        if kwargs.get(name):
            raise NotImplementedError(f"{name}: Int4StaticCache does not take it; use Int4Cache")
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    append = not pending.appended
    pending.appended = True
    if pending.layer.room is not None:
        options = mask, causal, scaling, softcap, s_aux, append
        return pending.layer.attend_on_cuda(query, pending.key, pending.value, *options), None
    arguments = query, pending.key, pending.value, mask, pending.state, causal, scaling, softcap, s_aux, append
    return append_and_attend(*arguments), None
