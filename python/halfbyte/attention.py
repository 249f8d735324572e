"""attn_implementation="halfbyte" for transformers: attention on packed codes, or on a first prefill's raw states."""

import math

import torch
from torch.compiler import is_compiling
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# Arguments with which a model narrows attention to a few tokens or adds to its softmax, and which nothing here reads.
NOT_READ = ("indices", "block_indices", "sinks")
REFUSED = frozenset(("output_attentions", *NOT_READ))
SCORE_BYTES = 32 << 20  # of one tile of float32 scores, where torch's fused kernels can not do the formula


class Step:
    """What one `Int4Layer.update` added to a layer: the raw K, V and the span of positions they took."""

    __slots__ = ("k", "layer", "length", "start", "tensors", "v")

    def __init__(self, layer, k, v, start):
        self.layer = layer
        self.k = k  # [batch, kv_heads, new tokens, head_dim_k]
        self.v = v
        self.start = start  # tokens seen before
        self.length = start + k.shape[2]  # and after
        self.tensors = None

    @property
    def tokens(self):
        """How many tokens the queries of this step may see, as the layer's `get_mask_sizes` announced it."""
        window = self.layer.sliding_window
        old = min(self.start, window - 1) if window else self.start
        return old + self.k.shape[2]

    def dense(self):
        """K and V as tensors [batch, kv_heads, tokens, head_dim], unpacked unless they are a first prefill."""
        if self.layer.consistent:
            raise NotImplementedError(
                f'prefill="consistent": layer {self.layer.layer_idx}: the model uses K and V other than by attention'
            )
        if self.tensors is None:
            self.tensors = (self.k, self.v) if self.start == 0 else self.layer.unpack(self)
        return self.tensors


class States:
    """Stands for the K or the V that `Int4Cache.update` returns; becomes a tensor if anything but attention uses it."""

    __slots__ = ("part", "step")

    def __init__(self, step, part):
        self.step = step
        self.part = part  # 0: K, 1: V

    @property
    def shape(self):
        batch, heads, _, head_dim = (self.step.v if self.part else self.step.k).shape
        return torch.Size((batch, heads, self.step.tokens, head_dim))

    @property
    def dtype(self):
        return self.step.k.dtype

    @property
    def device(self):
        return self.step.k.device

    @property
    def ndim(self):
        return 4

    def dim(self):
        return 4

    def size(self, dim=None):
        return self.shape if dim is None else self.shape[dim]

    def dense(self):
        return self.step.dense()[self.part]

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return func(*_densify(args), **_densify(kwargs or {}))


def _densify(value):
    if type(value) is States:
        return value.dense()
    if isinstance(value, (list, tuple)):
        return type(value)(_densify(item) for item in value)
    if isinstance(value, dict):
        return {name: _densify(item) for name, item in value.items()}
    return value


def _operator(name):
    return lambda self, *args: getattr(self.dense(), name)(*_densify(args))


# Python looks operators up on the type, so __getattr__ never sees these.
for _name in (
    *("getitem", "len", "iter", "bool", "neg", "eq", "ne", "lt", "le", "gt", "ge"),
    *(side + op for op in ("add", "sub", "mul", "truediv", "matmul", "pow") for side in ("", "r")),
):
    setattr(States, f"__{_name}__", _operator(f"__{_name}__"))
States.__hash__ = object.__hash__


class _Inference(torch.autograd.Function):
    """Lets a forward pass through and refuses the backward, instead of dropping gradients silently."""

    @staticmethod
    def forward(ctx, out, query):
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("backward through Int4Cache is not supported: train with use_cache=False")


class Pending:
    """What `Int4StaticCache.update` returns for K and V: new states that attention appends when it runs."""

    def __init__(self, layer, state, key, value):
        self.layer = layer
        self.state = state  # of a layer in CPU memory, as it was before these
        self.key = key  # [batch, kv_heads, new tokens, head_dim_k]
        self.value = value
        self.appended = False


def halfbyte_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    is_causal=None,
    softcap=None,
    s_aux=None,
    position_bias=None,
    **kwargs,
):
    """The attention function of attn_implementation="halfbyte": on packed codes where the kernels can do it.

    query: [batch, heads, queries, head_dim]. key, value: what `Int4Cache.update` returned, or tensors
    [batch, kv_heads, tokens, head_dim]. attention_mask: None, bool [batch or 1, 1, queries, tokens] (True = visible),
    or additive. softcap c: score -> c tanh(score / c). s_aux: [heads], one more logit in each softmax, without value.
    Returns ([batch, queries, heads, head_dim_v], None). What the packed kernels can not do (additive masks, masks or
    biases that differ between heads, dropout, attention to later tokens) runs on unpacked K and V.

    What Int4StaticCache.update returned goes to a custom operator, which torch.compile can trace; it takes neither
    dropout nor position_bias.
    """
    if type(key) is Pending or is_compiling():
        attend = _attend_untraced
        if type(key) is Pending:
            from .static import attend_pending as attend
        options = {"dropout": dropout, "is_causal": is_causal, "softcap": softcap, "s_aux": s_aux}
        options |= {"position_bias": position_bias, "scaling": scaling, **kwargs}
        return attend(module, query, key, value, attention_mask, **options)
    if not REFUSED.isdisjoint(kwargs):
        check_options(module, kwargs)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    rest = scaling, causal, dropout, softcap, s_aux, position_bias
    if type(key) is not States or type(value) is not States or value.step is not key.step:
        _adopt(key, module)
        return _attend_dense(module, query, _densify(key), _densify(value), attention_mask, *rest, **kwargs)

    step = key.step
    layer = step.layer
    queries = query.shape[2]
    if attention_mask is not None:
        _check_mask(attention_mask, query, step)
    if step.start == 0 and not layer.consistent:
        mask = attention_mask if attention_mask is not None else _causal_mask(step, queries, causal)
        result = _attend_dense(module, query, step.k, step.v, mask, *rest, **kwargs)
        layer.commit(step, attention_mask, module)
        return result

    mask, packed = attention_mask, queries == 1 or causal
    if mask is not None:
        mask = mask if mask.dtype is torch.bool else _as_bool(mask)
        packed = mask is not None and mask.shape[1] == 1
    if not packed or dropout or position_bias is not None or queries not in (1, step.length - step.start):
        if layer.consistent:
            raise NotImplementedError(
                f'prefill="consistent": layer {layer.layer_idx} takes causal attention, with masks that show or hide'
            )
        mask = attention_mask if attention_mask is not None else _causal_mask(step, queries, causal)
        return _attend_dense(module, query, *step.dense(), mask, *rest, **kwargs)
    if layer.consistent:
        layer.commit(step, attention_mask, module)
    out = layer.attend(step, query, mask, scaling, softcap, s_aux)
    if query.requires_grad and torch.is_grad_enabled():
        out = _Inference.apply(out, query)
    return out, None


_attend_untraced = torch.compiler.disable(halfbyte_attention)  # nothing in there can be traced: addresses, lengths


def check_options(module, options):
    """Raises for what a model asks of its attention and the packed kernels do not do, rather than leaving it out."""
    if options.get("output_attentions"):
        raise NotImplementedError(
            'output_attentions=True: attn_implementation="halfbyte" forms no attention weights; '
            'call model.set_attn_implementation("eager") to get them'
        )
    for name in NOT_READ:
        if options.get(name) is not None:
            raise NotImplementedError(
                f'layer {module.layer_idx}: {name}: attn_implementation="halfbyte" can not do the attention of '
                f'{type(module).__name__}; call model.set_attn_implementation("eager")'
            )


def _adopt(key, module):
    """Shows a cache that was made with a copy of the model's config the one to watch, so that it stops unpacking."""
    shared = getattr(key, "halfbyte_shared", None)
    if shared is not None:
        shared.config = module.config


def _check_mask(mask, query, step):
    batch, _, queries, _ = query.shape
    if (
        mask.dim() != 4
        or mask.shape[0] not in (1, batch)
        or mask.shape[2] not in (1, queries)
        or mask.shape[3] != step.tokens
    ):
        raise ValueError(
            f"attention_mask: got shape {list(mask.shape)}, takes [{batch} or 1, 1, {queries}, {step.tokens}] "
            f"as layer {step.layer.layer_idx} of the cache holds {step.tokens} tokens for these queries"
        )


def _as_bool(mask):
    """An additive mask as bool, or None if it does more than show or hide."""
    shown = mask == 0
    return shown if bool((shown | (mask <= torch.finfo(mask.dtype).min / 2)).all()) else None


def _causal_mask(step, queries, causal):
    """The bool mask [1, 1, queries, tokens] that None stands for, or None where `_attend_dense` does without."""
    tokens, window = step.tokens, step.layer.sliding_window
    if not causal or queries == 1 or (tokens == queries and not (window and tokens > window)):
        return None
    token = torch.arange(tokens, device=step.k.device)
    last = torch.arange(tokens - queries, tokens, device=step.k.device)[:, None]
    shown = token <= last
    return (shown & (token > last - window) if window else shown)[None, None]


def _attend_dense(
    module,
    query,
    key,
    value,
    mask,
    scaling,
    causal,
    dropout,
    softcap,
    s_aux,
    position_bias,
    **kwargs,
):
    """Attention on tensors: the library's SDPA, or, with soft-capping or sinks, the formula itself."""
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=causal,
            position_bias=position_bias,
            **kwargs,
        )
    if position_bias is not None or dropout:
        raise NotImplementedError(
            'position_bias or dropout together with softcap or s_aux: attn_implementation="halfbyte" does not do it; '
            'call model.set_attn_implementation("eager")'
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return _attend_tiled(query, key, value, mask, scale, causal, softcap, s_aux), None


def _attend_tiled(query, key, value, mask, scale, causal, softcap, s_aux):
    """softmax(c tanh(q k / c), with a sink logit) v in float32, tile by tile; [batch, queries, heads, head_dim_v]."""
    batch, heads, queries, _ = query.shape
    kv_heads, tokens = key.shape[1], key.shape[2]
    group = heads // kv_heads
    keys, values = key.float(), value.float()
    out = query.new_empty(batch, queries, heads, value.shape[-1])
    tile = max(1, SCORE_BYTES // (4 * batch * heads * tokens))
    token = torch.arange(tokens, device=query.device)
    for begin in range(0, queries, tile):
        end = min(begin + tile, queries)
        q = query[:, :, begin:end].float().reshape(batch, kv_heads, group * (end - begin), -1)
        scores = (q @ keys.transpose(2, 3)) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.view(batch, heads, end - begin, tokens)
        if mask is not None:
            part = mask[:, :, begin:end] if mask.shape[2] > 1 else mask
            scores = scores.masked_fill(~part, -math.inf) if part.dtype is torch.bool else scores + part
        elif causal and queries > 1:
            last = torch.arange(begin, end, device=query.device)[:, None] + tokens - queries
            scores = scores.masked_fill(token > last, -math.inf)
        if s_aux is not None:
            sink = s_aux.float().view(1, heads, 1, 1).expand(batch, heads, end - begin, 1)
            weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1).nan_to_num(0.0)  # a query that may see nothing gets zeros, as from SDPA
        mixed = weights.reshape(batch, kv_heads, -1, tokens) @ values
        out[:, begin:end] = mixed.view(batch, heads, end - begin, -1).transpose(1, 2)
    return out


AttentionInterface.register("halfbyte", halfbyte_attention)
# Without a mask function of its own, the library would hand this one no masks at all.
AttentionMaskInterface.register("halfbyte", sdpa_mask)
