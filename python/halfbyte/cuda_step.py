"""A decoding step of one layer on CUDA that reads its length on the device: what is launched, and its operator."""

import hashlib
import math

import torch

from . import _cuda
from .cuda_kernels import describe
from .gpu_kernels import BLOCK_TOKENS, LARGEST, PAGE_TOKENS

CELLS = 8  # of the state; what they are: HalfbyteCudaLength in cuda/halfbyte_cuda.h
SEEN, LENGTH, NEW, PACKED_FROM, OFFSET_READY, BAD, FULL = range(7)
ROW_TILE = 8  # query heads that one part of an attention kernel takes
MOST_GROUP = 128  # query heads a KV head

# key -> StepPlan: what the operator's `plan` names. Kept for good, as CUDA graphs hold addresses of its tables.
_plans = {}


def tail_slots(recipe):
    """Raw tokens that the ring of the newest ones holds: those of the rule, and a block that is being packed."""
    held = max(recipe.raw_window, recipe.offset_tokens if recipe.offset else 0)
    return -(-held // BLOCK_TOKENS) * BLOCK_TOKENS + 2 * BLOCK_TOKENS


class StepPlan:
    """All that is the same in every step of a GpuLayer on CUDA, whichever cache it belongs to: sizes, tables, calls.

    Storage comes as four tensors that never move, see StaticRoom: state, pages, raw and offsets.
    """

    def __init__(self, layer, capacity, ring):
        kernels, recipe = layer.kernels, layer.recipe
        self.device, self.batch, self.kv_heads, self.dims = layer.device, layer.batch, layer.kv_heads, layer.dims
        self.dtype, self.capacity, self.ring, self.page_bytes = layer.dtype, capacity, ring, kernels.page_bytes
        self.recipe, self.sink, self.slots = recipe, layer.sink, tail_slots(recipe)
        self.window, self.warm_up, self.has_offset = layer.window, layer._warm_up, recipe.offset
        self.is_mean = [recipe.offset and given is None for given in layer._given]
        self.turn = layer._turn if recipe.offset else None
        self.library, self.description = kernels._library, kernels._description
        self.rotations, self.factors = kernels._rotations, layer._factors
        self.waves = self.turn.waves(capacity) if self.turn else None
        self.span_count = -(-self.slots // self.turn.span) + 1 if self.turn else 0
        self.counted_tokens = self.slots + self.sink  # those that can be raw with nothing packed
        self._space = {}  # {query heads: bytes}
        self._placed = None  # addresses of the storage that the calls name
        self._lay_out()
        self._describe()

    @classmethod
    def of(cls, layer, capacity, ring):
        """The one for a layer as it is now; equal layers of other caches have the same."""
        facts = [layer.kernels._description, layer.batch, capacity, ring, layer.window, layer._warm_up, layer.device]
        facts += [[None if x is None else _digest(x) for x in layer._given], str(layer.recipe), layer.kernels._library]
        facts += [_digest(x) for pair in layer._factors for x in pair if x is not None]
        if layer.recipe.rotation == "dense":
            facts += [_digest(tables[0]) for tables in layer.kernels._rotations]
        if layer._turn is not None:
            facts += [_digest(layer._turn.frequencies), layer._turn.interleaved, layer._turn.span]
        facts[0] = bytes(facts[0])
        key = hashlib.sha256(repr(facts).encode()).hexdigest()
        plan = _plans.get(key)
        if plan is None:
            plan = _plans[key] = cls(layer, capacity, ring)
            plan.key = key
        return plan

    # ------------------------------------------------------------------------------------------------ storage

    def _lay_out(self):
        """Shapes of what lies one after the other in `raw` and in `offsets`."""
        rows = self.batch, self.kv_heads
        self.raw_shapes = {
            f"{kind}_{side}": (*rows, tokens, dim)
            for kind, tokens in (("sinks", self.sink), ("tail", self.slots))
            for side, dim in zip("kv", self.dims, strict=True)
        }
        # state: the cells; counters of thread blocks, int32; where pages lie, in bytes from the start of `pages`.
        self._table_at = CELLS + self.batch * self.kv_heads * MOST_GROUP // ROW_TILE // 2 + 1
        self.table_pages = -(-self.capacity // PAGE_TOKENS)
        self.offset_shapes = {}
        if self.has_offset:
            for side, dim in zip("kv", self.dims, strict=True):
                self.offset_shapes |= {f"mu_{side}": (*rows, dim), f"rotated_{side}": (*rows, dim)}
            of_spans = *rows, self.span_count, self.dims[0]
            self.offset_shapes |= {"span_mu_k": of_spans, "span_rotated_k": of_spans}
            self.offset_shapes["weights"] = self.batch, self.counted_tokens

    def _pieces(self, shapes, tensor):
        """{name: view of its part of the flat tensor}"""
        sizes = [math.prod(shape) for shape in shapes.values()]
        parts = tensor[: sum(sizes)].split(sizes)
        return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def raw_pieces(self, raw):
        return self._pieces(self.raw_shapes, raw)

    def offset_pieces(self, offsets):
        return self._pieces(self.offset_shapes, offsets)

    @torch.inference_mode(False)  # what is made in inference mode could not be changed outside of it
    def make_storage(self):
        """(state, pages, raw, offsets) of an empty layer."""
        flat = {"device": self.device}
        sequences = torch.arange(self.batch, **flat)[:, None]
        table = (sequences * self.ring + torch.arange(self.table_pages, **flat) % self.ring) * self.page_bytes
        state = torch.cat([torch.zeros(self._table_at, dtype=torch.int64, **flat), table.view(-1)])
        # Zeros: kernels read whole blocks and all offsets, and what does not count must be numbers.
        pages = torch.zeros(self.batch, self.ring, self.page_bytes, dtype=torch.uint8, **flat)
        raw = torch.zeros(sum(map(math.prod, self.raw_shapes.values())), dtype=self.dtype, **flat)
        floats = max(sum(map(math.prod, self.offset_shapes.values())), 1)
        offsets = torch.zeros(floats, dtype=torch.float32, **flat)
        return state, pages, raw, offsets

    # ------------------------------------------------------------------------------------------------ launches

    def _describe(self):
        """The calls, as far as they are the same for all storage."""
        recipe = self.recipe
        at = _cuda.Length(None, self.capacity, self.slots, self.sink, recipe.raw_window, self.warm_up, self.window)
        tables = []
        for side in (0, 1):
            held = *self.rotations[side], None, None, *self.factors[side]
            tables.append(_cuda.Tables(*(None if x is None else x.data_ptr() for x in held)))
        pages = _cuda.Pages(None, self.table_pages, 0)
        self._append = _cuda.Append(self.description, at)
        self._encode = _cuda.Encode(self.description, *tables, pages, at=at)
        self._attend = _cuda.Attend(self.description, *tables, pages, at=at)
        for call in (self._append, self._encode, self._attend):
            call.batch, call.device = self.batch, self.device.index
        self._encode.limit = LARGEST[recipe.scale_bits]
        call = self._attend
        call.causal, call.sliding_window, call.warm_up, call.queries = 1, self.window, self.warm_up, 1
        call.sink_tokens, call.raw_window, call.n_raw = self.sink, recipe.raw_window, 2
        call.raw[0].are_sinks = 1
        if self.turn:
            turn = _cuda.Turn(self.waves.data_ptr(), self.turn.span, self.turn.pairs, self.turn.interleaved)
            self._append.turn = call.turn = turn
        for side, offset in enumerate((self._append.k_offset, self._append.v_offset)):
            transposed = self.rotations[side][1]
            offset.transposed = None if transposed is None else transposed.data_ptr()
            offset.is_mean, offset.span_count = self.is_mean[side], 0 if side else self.span_count
        self._append.weight_stride = self.counted_tokens

    def _place(self, state, pages, raw, offsets):
        """Tells the calls where this step's storage lies."""
        where = tuple(tensor.data_ptr() for tensor in (state, pages, raw, offsets))
        if where == self._placed:
            return
        self._placed = where
        append, encode, attend = self._append, self._encode, self._attend
        for call in (append, encode, attend):
            call.at.cells = state.data_ptr()
        for call in (encode, attend):
            call.pages.table, call.pages.pool = state.data_ptr() + 8 * self._table_at, pages.data_ptr()
        encode.bad = state.data_ptr() + 8 * BAD
        attend.arrivals = state.data_ptr() + 8 * CELLS
        held = self.raw_pieces(raw)
        for side in "kv":
            sinks, tail = held[f"sinks_{side}"], held[f"tail_{side}"]
            for view in (getattr(append, f"{side}_tail"), getattr(encode, side), getattr(attend.raw[1], side)):
                describe(view, tail)
            for view in (getattr(append, f"{side}_sinks"), getattr(attend.raw[0], side)):
                describe(view, sinks)
        if self.has_offset:
            self._place_offsets(self.offset_pieces(offsets))

    def _place_offsets(self, held):
        for side in "kv":
            mu, rotated = held[f"mu_{side}"].data_ptr(), held[f"rotated_{side}"].data_ptr()
            made, packs = getattr(self._append, f"{side}_offset"), getattr(self._encode, f"{side}_tables")
            made.offset, made.rotated_offset = packs.offset, packs.rotated_offset = mu, rotated
            tables = getattr(self._attend, side)
            tables.offset, tables.rotated_offset = mu, rotated
        if self.turn:
            made, packs = self._append.k_offset, self._encode.k_tables
            made.span_offset = packs.offset = held["span_mu_k"].data_ptr()
            made.span_rotated_offset = packs.rotated_offset = held["span_rotated_k"].data_ptr()
            packs.offset_span, packs.offset_count = self.turn.span, self.span_count
        self._append.weights = held["weights"].data_ptr()

    def launch(self, name, call):
        call.stream = torch._C._cuda_getCurrentRawStream(self.device.index)
        error = getattr(self.library, f"halfbyte_cuda_{name}")(call)
        if error:
            raise RuntimeError(f"CUDA: {self.library.halfbyte_cuda_error(error).decode()}")

    def append(self, key, value):
        call = self._append
        describe(call.k, key)
        describe(call.v, value)
        self.launch("append", call)
        self.launch("encode", self._encode)

    def attend(self, query, out, mask, sinks, scaling, softcap):
        call = self._attend
        heads = call.heads = query.shape[1]
        call.scale, call.softcap = scaling, softcap
        describe(call.q, query)
        call.out.data = out.data_ptr()
        call.out.batch_stride, call.out.token_stride, call.out.head_stride, _ = out.stride()
        call.sinks = None if sinks is None else sinks.data_ptr()
        call.mask = None
        if mask is not None:
            call.mask, call.mask_tokens, call.mask_batch_stride = mask.data_ptr(), self.capacity, mask.stride(0)
        if heads not in self._space:
            self._space[heads] = self.library.halfbyte_cuda_attend_space(call)
        space = torch.empty(self._space[heads], dtype=torch.uint8, device=query.device)
        call.space = space.data_ptr()
        self.launch("attend", call)

    def check(self, query, key, value, mask):
        """ValueError for what the calls can not describe."""
        for name, got, heads, dim in (
            ("key", key, self.kv_heads, self.dims[0]),
            ("value", value, self.kv_heads, self.dims[1]),
        ):
            takes = self.batch, heads, 1, dim
            if tuple(got.shape) != takes or got.dtype is not self.dtype:
                raise ValueError(f"{name}: got {list(got.shape)} and {got.dtype}, takes {list(takes)} and {self.dtype}")
        batch, heads, queries, dim = query.shape
        fits = (batch, queries, dim) == (self.batch, 1, self.dims[0]) and heads % self.kv_heads == 0
        if not fits or query.dtype is not self.dtype or heads > MOST_GROUP * self.kv_heads:
            raise ValueError(
                f"query: got {list(query.shape)} and {query.dtype}, takes [{self.batch}, a multiple of {self.kv_heads} "
                f"up to {MOST_GROUP} times that, 1, {self.dims[0]}] and {self.dtype}"
            )
        if mask is None:
            return
        shown = mask.dtype is torch.bool and mask.dim() == 4 and tuple(mask.shape[1:3]) == (1, 1)
        if not shown or mask.shape[0] not in (1, self.batch) or mask.shape[3] < self.capacity:
            raise ValueError(
                f"attention_mask: got {list(mask.shape)} and {mask.dtype}, takes bool [{self.batch} or 1, 1, 1, "
                f"{self.capacity}]: a column for every token that the cache has room for"
            )


def _digest(tensor):
    return hashlib.sha256(tensor.cpu().contiguous().numpy().tobytes()).hexdigest()


def _in_one_piece(x):
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("halfbyte::step", mutates_args=("state", "pages", "raw", "offsets"))
def step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    state: torch.Tensor,
    pages: torch.Tensor,
    raw: torch.Tensor,
    offsets: torch.Tensor,
    plan: str,
    scaling: float,
    softcap: float,
    append: bool,
) -> torch.Tensor:
    """Appends K, V [batch, kv_heads, 1, head_dim] to the layer in `state` … `offsets` and attends query to it.

    query: [batch, heads, 1, head_dim]; mask: bool [batch or 1, 1, 1, capacity] or None; sinks: float32 [heads] or None;
    softcap: 0 for none; append=False attends again to a state that is in the layer already. Launches the same kernels
    with the same arguments in every step, and reads nothing back. Returns [batch, 1, heads, head_dim_v].
    """
    named = _plans.get(plan)
    if named is None:
        raise RuntimeError("halfbyte::step: the cache of these states is gone")
    named.check(query, key, value, mask)
    named._place(state, pages, raw, offsets)
    if append:
        named.append(_in_one_piece(key), _in_one_piece(value))
    if mask is not None:
        mask = _in_one_piece(mask).expand(named.batch, -1, -1, -1)
    if sinks is not None:
        sinks = sinks.float().contiguous()
    out = query.new_empty(named.batch, 1, query.shape[1], named.dims[1])
    named.attend(_in_one_piece(query), out, mask, sinks, scaling, softcap)
    return out


@step.register_fake
def _(query, key, value, mask, sinks, state, pages, raw, offsets, plan, scaling, softcap, append):
    batch, heads, queries, _ = query.shape
    return query.new_empty(batch, queries, heads, value.shape[-1])


# An operator, not state[0]: inductor puts that reading off, and would compute positions from what a step has moved on.
@torch.library.custom_op("halfbyte::tokens_seen", mutates_args=())
def tokens_seen(state: torch.Tensor) -> torch.Tensor:
    """How many tokens a layer holds, int64 [], before or after a step but not in between."""
    return state[SEEN].clone()


@tokens_seen.register_fake
def _(state):
    return state.new_empty(())
