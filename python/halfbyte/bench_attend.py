"""Times attention over packed codes: of one new token, and of several that share a long packed prefix."""

from __future__ import annotations

import statistics
import time
from types import SimpleNamespace

from . import _native
from .bench import Geometry, ratio, restored, roofs, time_alternately, uncalibrated, use_threads
from .recipes import bits_per_value

SMALLEST_SET = 1 << 16  # bytes: what a bandwidth can be measured over
FEW_QUERIES = 4


def _strides(tensor):
    return tuple(tensor.stride()[:3])


def _random_states(geometry: Geometry, tokens: int, queries: int, batch: int, seed: int, dtype):
    """(query, key, value) of `tokens` tokens, the newest `queries` of which ask."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def random(heads, count):
        return torch.randn((batch, heads, count, geometry.head_dim), generator=generator).to(dtype)

    return random(geometry.heads, queries), random(geometry.kv_heads, tokens), random(geometry.kv_heads, tokens)


def _append(cache, key, value):
    cache.append(key.data_ptr(), value.data_ptr(), key.shape[0], key.shape[2], _strides(key), _strides(value))


def _packed(geometry: Geometry, recipe, dtype: str):
    import torch

    _, _, kv_heads, head_dim = geometry
    layer = _native.Layer(kv_heads=kv_heads, head_dim_k=head_dim, head_dim_v=head_dim, dtype=dtype, recipe=recipe)
    if recipe.offset and recipe.offset_span:
        frequencies = torch.pow(1e6, -torch.arange(0, head_dim, 2) / head_dim)  # of a RoPE over all channels
        layer.set_frequencies(frequencies.data_ptr(), frequencies.numel())
    return layer


def _folded(query, kv_heads):
    """[batch, heads, queries, d] as [batch, kv_heads, group · queries, d]: one product a KV head, not one a head."""
    batch, heads, queries, d = query.shape
    return query.reshape(batch, kv_heads, heads // kv_heads * queries, d)


def _attend_arms(geometry: Geometry, tokens, batch, recipe, seed, sdpa):
    """The ways to attend one new token over the same random K, V: {name: call}."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    query, key, value = _random_states(geometry, tokens, 1, batch, seed, torch.float16)
    scale, arms = geometry.head_dim**-0.5, {}
    for name, cache in (
        ("fp16", _native.RawCache(geometry.kv_heads, geometry.head_dim, "float16")),
        ("int4", _packed(geometry, recipe, "float16")),
    ):
        _append(cache, key, value)
        out = torch.empty_like(query)
        arms[name] = lambda cache=cache, out=out: cache.attend(
            query.data_ptr(), out.data_ptr(), geometry.heads, 1, _strides(query), _strides(out), scale
        )
    if sdpa:
        # The library's own function: it decides how the query heads of a group are folded. Then the best fold.
        module = SimpleNamespace(num_key_value_groups=geometry.group, is_causal=True)
        q, k, v = (t.to(torch.bfloat16) for t in (query, key, value))
        folded = _folded(q, geometry.kv_heads)
        arms["sdpa"] = lambda: sdpa_attention_forward(module, q, k, v, None, scaling=scale)
        arms["sdpa_folded"] = lambda: scaled_dot_product_attention(folded, k, v, scale=scale)
    return arms


def _attend_row(geometry, recipe, recipe_name, tokens, n_threads, batch, seconds, limits) -> dict:
    bytes_per_token = {  # of one KV head, K and V
        "fp16": 4 * geometry.head_dim,
        "int4": 2 * geometry.head_dim * bits_per_value(recipe, geometry.head_dim) / 8,
    }
    heads = geometry.kv_heads * batch
    ns = {name: statistics.median(times) * 1e9 / (tokens * heads) for name, times in seconds.items()}
    row = {"geometry": geometry.name, "heads": geometry.heads, "kv_heads": geometry.kv_heads}
    row |= {"head_dim": geometry.head_dim, "backend": _native.backend(), "recipe": recipe_name, "tokens": tokens}
    row |= {"threads": n_threads}
    row |= {f"{name}_ns": value for name, value in ns.items()}
    for name in (name for name in ns if name != "int4"):
        row |= ratio(seconds, name, "int4")
    row["read_bandwidth_share"] = bytes_per_token["int4"] / ns["int4"] / limits["read_gb_per_s"]
    sets = {name: max(int(each * tokens * heads), SMALLEST_SET) for name, each in bytes_per_token.items()}
    row["roofs"] = limits | {f"{name}_bytes": each for name, each in bytes_per_token.items()}
    row["roofs"] |= {f"{name}_set_gb_per_s": _native.read_bandwidth(held, n_threads, 5) for name, held in sets.items()}
    return row | {"rounds": {f"{name}_s": times for name, times in seconds.items()}}


def bench_attend(
    geometries, tokens, threads, batch=1, recipes=("default",), backends=(), rounds=9, seed=0, sdpa=True, progress=False
) -> list[dict]:
    """Rows, one for each backend, geometry, recipe, number of tokens and of threads.

    A row has wall nanoseconds per token per KV head for one query token, medians over rounds in which the arms take
    turns in this process: fp16_ns (our kernel over K, V as given), int4_ns (the packed cache), and with sdpa
    sdpa_ns (bf16 attention as transformers calls it) and sdpa_folded_ns (the same over queries folded by KV head).
    x_over_int4 is the median of the rounds' ratios, x_over_int4_spread its quartiles, rounds every single time.
    roofs: read_gb_per_s, dot_gops and fma_gflops of the machine with as many threads; the bytes a kernel reads for a
    token of a KV head, and ..._set_gb_per_s, the read bandwidth over a set as large as all it reads.
    read_bandwidth_share: bytes of codes and scales a second over read_gb_per_s.
    """
    import torch
    from tqdm import tqdm

    chosen = {recipe: uncalibrated(recipe, "bench attend") for recipe in recipes}
    rows = []
    cells = [(b, g, r, n) for b in backends or [_native.backend()] for g in geometries for r in chosen for n in tokens]
    with restored(), torch.inference_mode():
        limits = {}
        for backend, geometry, recipe, n_tokens in tqdm(cells, "bench attend", disable=not progress, leave=False):
            _native.set_backend(backend)
            arms = _attend_arms(geometry, n_tokens, batch, chosen[recipe], seed, sdpa)
            for n_threads in threads:
                use_threads(n_threads)
                if (backend, n_threads) not in limits:
                    limits[backend, n_threads] = roofs(n_threads)
                seconds = time_alternately(arms, rounds)
                found = limits[backend, n_threads]
                rows.append(_attend_row(geometry, chosen[recipe], recipe, n_tokens, n_threads, batch, seconds, found))
    return rows


# ---------------------------------------------------------------------------------------- several queries, one prefix


def _unpack_arms(geometry: Geometry, layer, states, queries):
    """{name: call}: unpack the prefix of `layer`, join the new tokens' K and V to it, attend with PyTorch."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    query, key, value = states
    batch, scale = query.shape[0], geometry.head_dim**-0.5
    module = SimpleNamespace(num_key_value_groups=geometry.group, is_causal=True)
    prefix = layer.length
    room = torch.empty((2, batch, geometry.kv_heads, prefix, geometry.head_dim))
    mask = torch.ones((queries, prefix + queries), dtype=torch.bool).tril(prefix)[None, None]
    folded_mask = mask.repeat(1, 1, geometry.group, 1)

    def arm(dtype, fold):
        q, new_k, new_v = query.to(dtype), key[:, :, prefix:].to(dtype), value[:, :, prefix:].to(dtype)
        q = _folded(q, geometry.kv_heads) if fold else q

        def call():
            layer.dequantize(room[0].data_ptr(), room[1].data_ptr())
            k, v = torch.cat((room[0].to(dtype), new_k), 2), torch.cat((room[1].to(dtype), new_v), 2)
            if fold:
                return scaled_dot_product_attention(q, k, v, attn_mask=folded_mask, scale=scale).view(query.shape)
            return sdpa_attention_forward(module, q, k, v, mask, scaling=scale)[0].transpose(1, 2)

        return call

    return {
        f"{str(dtype).removeprefix('torch.')}{', folded' if fold else ''}": arm(dtype, fold)
        for dtype in (torch.float32, torch.bfloat16)
        for fold in (True, False)
    }


def _queries_arms(geometry: Geometry, prefix, queries, recipe, batch, seed):
    """(our call, make): the same states over the same packed prefix; make(n) gives the unpacking arms of n queries."""
    import torch

    query, key, value = _random_states(geometry, prefix + queries, queries, batch, seed, torch.bfloat16)
    before, layer = _packed(geometry, recipe, "bfloat16"), _packed(geometry, recipe, "bfloat16")
    new_k, new_v = key[:, :, prefix:], value[:, :, prefix:]
    for cache in (before, layer):
        _append(cache, key[:, :, :prefix], value[:, :, :prefix])
    _append(layer, new_k, new_v)
    out = torch.empty_like(query)

    def packed():
        layer.attend(
            query.data_ptr(), out.data_ptr(), geometry.heads, queries, _strides(query), _strides(out),
            geometry.head_dim**-0.5, chunk_k=new_k.data_ptr(), chunk_v=new_v.data_ptr(),
            chunk_k_strides=_strides(new_k), chunk_v_strides=_strides(new_v),
        )  # fmt: skip
        return out

    def make(n):
        return _unpack_arms(geometry, before, (query[:, :, :n], key[:, :, : prefix + n], value[:, :, : prefix + n]), n)

    return packed, make


def _seconds(call) -> float:
    """The shorter of two calls."""
    took = []
    for _ in range(2):
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return min(took)


def _quickest(make, queries: int):
    """(name, call) of the best way to unpack. Ways that take three times as long with few queries are out at once."""
    few = {name: _seconds(call) for name, call in make(min(queries, FEW_QUERIES)).items()}
    arms = {name: call for name, call in make(queries).items() if few[name] <= 3 * min(few.values())}
    took = {name: _seconds(call) for name, call in arms.items()}
    best = min(took, key=took.get)
    return best, arms[best]


def bench_queries(
    geometries, tokens, queries, threads, batch=1, recipes=("default",), backends=(), rounds=5, seed=0, progress=False
) -> list[dict]:
    """Rows, one for each backend, geometry, recipe, prefix, number of queries and of threads.

    int4_ms: `queries` new tokens attend to a packed prefix and to themselves, straight on the codes. unpack_ms: the
    prefix is unpacked to float32, joined with the new tokens and attended by scaled_dot_product_attention, in the
    quickest of four ways, which `unpack` names: float32 or bfloat16, query heads folded by KV head or as transformers
    calls it. unpack_over_int4 is the median of the rounds' ratios, unpack_over_int4_spread its quartiles.
    """
    import torch
    from tqdm import tqdm

    chosen = {recipe: uncalibrated(recipe, "bench attend") for recipe in recipes}
    cells = [
        (backend, geometry, recipe, prefix, count)
        for backend in backends or [_native.backend()]
        for geometry in geometries
        for recipe in chosen
        for prefix in tokens
        for count in queries
    ]
    rows = []
    with restored(), torch.inference_mode():
        for backend, geometry, recipe, prefix, count in tqdm(cells, "bench attend", disable=not progress, leave=False):
            _native.set_backend(backend)
            packed, make = _queries_arms(geometry, prefix, count, chosen[recipe], batch, seed)
            for n_threads in threads:
                use_threads(n_threads)
                name, unpack = _quickest(make, count)
                seconds = time_alternately({"int4": packed, "unpack": unpack}, rounds)
                rows.append(
                    {"geometry": geometry.name, "backend": backend, "recipe": recipe, "prefix": prefix}
                    | {"queries": count, "threads": n_threads}
                    | {f"{arm}_ms": statistics.median(times) * 1e3 for arm, times in seconds.items()}
                    | {"unpack": name}
                    | ratio(seconds, "unpack", "int4")
                    | {"rounds": {f"{arm}_s": times for arm, times in seconds.items()}}
                )
    return rows
