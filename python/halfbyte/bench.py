"""Times attention on packed codes, packing itself and whole decoding steps against what they replace."""

from __future__ import annotations

import copy
import statistics
import time
from types import SimpleNamespace
from unittest.mock import patch

from . import _native
from .recipes import bits_per_value, get_recipe

SETTLE_S = 0.003  # after another library's threads ran: they spin for about that long and would steal our cores
SLICE_S = 0.02  # one arm runs about this long in a round
BANDWIDTH_BYTES = 256 << 20
BLOCK_TOKENS = 16  # a packed block


def time_alternately(arms: dict, rounds: int) -> dict[str, float]:
    """Median seconds a call of each arm; every round runs each of them for about SLICE_S, one after the other."""
    repeats = {}
    for name, call in arms.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, int(SLICE_S / max(time.perf_counter() - start, 1e-7)))
    seconds = {name: [] for name in arms}
    for _ in range(rounds):
        for name, call in arms.items():
            time.sleep(SETTLE_S)
            call()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(times) for name, times in seconds.items()}


def _strides(tensor):
    return tuple(tensor.stride()[:3])


def _attend_arms(heads, kv_heads, head_dim, tokens, batch, recipe, seed):
    """The three ways to attend one new token over the same random K, V: {name: call}."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(torch.float16)

    key, value = random(batch, kv_heads, tokens, head_dim), random(batch, kv_heads, tokens, head_dim)
    query, scale = random(batch, heads, 1, head_dim), head_dim**-0.5
    arms = {}
    for name, cache in (
        ("fp16", _native.RawCache(kv_heads, head_dim, "float16")),
        (
            "int4",
            _native.Layer(kv_heads=kv_heads, head_dim_k=head_dim, head_dim_v=head_dim, dtype="float16", recipe=recipe),
        ),
    ):
        cache.append(key.data_ptr(), value.data_ptr(), batch, tokens, _strides(key), _strides(value))
        out = torch.empty_like(query)
        arms[name] = lambda cache=cache, out=out: cache.attend(
            query.data_ptr(), out.data_ptr(), heads, 1, _strides(query), _strides(out), scale
        )
    # The library's own function: it decides how the query heads of a group are folded.
    module = SimpleNamespace(num_key_value_groups=heads // kv_heads, is_causal=True)
    dense = [t.to(torch.bfloat16) for t in (query, key, value)]
    arms["sdpa"] = lambda: sdpa_attention_forward(module, *dense, None, scaling=scale)
    return arms


def bench_attend(
    heads=12,
    kv_heads=2,
    head_dim=128,
    tokens=(4096, 32768),
    threads=(1, 2),
    batch=1,
    recipe="default",
    rounds=9,
    seed=0,
) -> list[dict]:
    """Rows {backend, tokens, threads, fp16_ns, int4_ns, sdpa_ns, read_bandwidth_share}, one for each pair.

    Times are wall nanoseconds per token per KV head for one query token; the three arms run in turn in this process:
    our fp16 kernel, the packed cache, and bf16 attention as transformers calls it. read_bandwidth_share: bytes of
    codes and scales a second over the read bandwidth measured with as many threads.
    """
    import torch

    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"heads: got {heads}; takes a multiple of kv_heads ({kv_heads})")
    recipe = get_recipe(recipe)
    if recipe.lambda_:
        raise ValueError("recipe: one with lambda needs a calibration; bench attend takes the others")
    bytes_per_token = 2 * head_dim * bits_per_value(recipe, head_dim) / 8  # of one KV head, K and V
    before = torch.get_num_threads(), _native.num_threads()
    rows = []
    try:
        for n_tokens in tokens:
            arms = _attend_arms(heads, kv_heads, head_dim, n_tokens, batch, recipe, seed)
            for n_threads in threads:
                torch.set_num_threads(n_threads)
                _native.set_num_threads(n_threads)
                bandwidth = _native.read_bandwidth(BANDWIDTH_BYTES, n_threads, 5)
                with torch.inference_mode():
                    seconds = time_alternately(arms, rounds)
                ns = {name: s * 1e9 / (n_tokens * kv_heads * batch) for name, s in seconds.items()}
                share = bytes_per_token / ns["int4"] / bandwidth
                rows.append(
                    {
                        "backend": _native.backend(),
                        "tokens": n_tokens,
                        "threads": n_threads,
                        "fp16_ns": ns["fp16"],
                        "int4_ns": ns["int4"],
                        "sdpa_ns": ns["sdpa"],
                        "read_bandwidth_share": share,
                    }
                )
    finally:
        torch.set_num_threads(before[0])
        _native.set_num_threads(before[1])
    return rows


class Stopwatch:
    """Adds up the wall time and the number of calls of the functions it is put on, over one step."""

    def on(self, function):
        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            self.calls += 1
            return result

        return timed

    def watched_step(self, step):
        """(wall seconds, those outside the functions, number of their calls) of one call of `step`."""
        self.seconds, self.calls = 0.0, 0
        start = time.perf_counter()
        step()
        wall = time.perf_counter() - start
        return wall, wall - self.seconds, self.calls


def _glue_arms(config, inputs, prompt, recipe, watch):
    """{name: one decoding step through all layers}; the watch is on what a step is meant to spend its time in.

    inputs: (query, key, value) of one new token for each layer; prompt: (key, value) of the tokens before, in all.
    """
    import torch
    from torch.nn import functional
    from transformers import DynamicCache
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from .attention import halfbyte_attention
    from .hf import Int4Cache

    groups = config.num_attention_heads // config.num_key_value_heads
    module = SimpleNamespace(num_key_value_groups=groups, is_causal=True, config=config)
    packed, full = Int4Cache(config, recipe=recipe), DynamicCache(config=config)

    def step(cache, attention):
        for layer, (query, key, value) in enumerate(inputs):
            attention(module, query, *cache.update(key, value, layer), None, scaling=config.head_dim**-0.5)

    sides = (packed, halfbyte_attention), (full, sdpa_attention_forward)
    for cache, attention in sides:
        for layer in range(len(inputs)):
            cache.update(*prompt, layer)
        step(cache, attention)  # packs the prompt
    for layer in packed.layers:  # nothing but these two: a call of another would fail
        layer.native = SimpleNamespace(append=watch.on(layer.native.append), attend=watch.on(layer.native.attend))
    cat, attend = watch.on(torch.cat), watch.on(functional.scaled_dot_product_attention)

    def full_step():
        with patch.object(torch, "cat", cat), patch.object(functional, "scaled_dot_product_attention", attend):
            return watch.watched_step(lambda: step(*sides[1]))

    return {"int4": lambda: watch.watched_step(lambda: step(*sides[0])), "fp": full_step}


def _glue_row(arms, layers, new_tokens):
    """The numbers of one prefix; see bench_glue. The arms take turns of a block of tokens."""
    steps = {name: [] for name in arms}
    for first in range(-BLOCK_TOKENS, new_tokens, BLOCK_TOKENS):
        for name, arm in arms.items():
            taken = [arm() for _ in range(BLOCK_TOKENS)]
            if first >= 0:  # those before warm up
                steps[name] += taken
    row = {}
    for name, glue in (("int4", "glue_us_per_layer"), ("fp", "fp_glue_us_per_layer")):
        wall, outside, calls = zip(*steps[name], strict=True)
        row |= {f"{name}_us_per_layer": statistics.median(wall) * 1e6 / layers}
        row |= {glue: statistics.median(outside) * 1e6 / layers}
        row |= {"extension_calls": max(calls) / layers} if name == "int4" else {}
    return row


def bench_glue(
    heads=4, kv_heads=2, head_dim=128, layers=4, prefixes=(256, 4096), new_tokens=128, recipe="default", seed=0
) -> list[dict]:
    """Rows {prefix, int4_us_per_layer, glue_us_per_layer, extension_calls, fp_us_per_layer, fp_glue_us_per_layer}.

    Microseconds of wall time a layer to decode one token of one sequence, random float32 states, one thread, medians
    over new_tokens steps, rounded up to whole blocks. int4 is Int4Cache.update and attention as a model calls them;
    its glue is that time less what the extension's append and attend take, measured around each of these calls in the
    very same steps. So checks, handles, the output's allocation, the stopwatch itself and all of Python are glue;
    turning a call's arguments into C++ is the extension's. fp is DynamicCache.update and the library's sdpa attention;
    its glue is that time less torch.cat of K and V and scaled_dot_product_attention, and so holds the freeing of the
    K and V before. extension_calls: the most calls of the extension a layer a step; one a step comes on top, which
    asks for the number of threads.
    """
    import torch
    from transformers import Qwen2Config

    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"heads: got {heads}; takes a multiple of kv_heads ({kv_heads})")
    recipe = get_recipe(recipe)
    if recipe.lambda_:
        raise ValueError("recipe: one with lambda needs a calibration; bench glue takes the others")
    config = Qwen2Config(
        hidden_size=heads * head_dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        attn_implementation="halfbyte",
    )
    generator = torch.Generator().manual_seed(seed)

    def random(n_heads, tokens):
        return torch.randn((1, n_heads, tokens, head_dim), generator=generator)

    inputs = [(random(heads, 1), random(kv_heads, 1), random(kv_heads, 1)) for _ in range(layers)]
    threads, rows = torch.get_num_threads(), []
    try:
        torch.set_num_threads(1)
        with torch.inference_mode():
            for prefix in prefixes:
                prompt = random(kv_heads, prefix), random(kv_heads, prefix)
                arms = _glue_arms(config, inputs, prompt, recipe, Stopwatch())
                rows.append({"prefix": prefix} | _glue_row(arms, layers, new_tokens))
    finally:
        torch.set_num_threads(threads)
    return rows


def encode_recipes() -> dict:
    """What packing costs, ingredient by ingredient."""
    return {
        "default": get_recipe("default"),
        "srht": get_recipe("default", rotation="srht"),
        "identity": get_recipe("default", rotation="identity"),
        "no-search": get_recipe("default", search=False),
        "srht-no-search": get_recipe("default", rotation="srht", search=False),
        **{name: get_recipe(name) for name in ("paper-per-token", "paper-g32", "g16", "k8v4")},
    }


def bench_encode(head_dim=128, vectors=262144, rounds=5, seed=0) -> list[dict]:
    """Rows {backend, head_dim, recipe, ns_per_vector}: packing random vectors on one thread, recipes in turn."""
    import numpy as np

    if vectors < 1:
        raise ValueError(f"vectors: got {vectors}; takes at least 1")
    x = np.random.default_rng(seed).standard_normal((vectors, head_dim), dtype=np.float32)
    recipes = encode_recipes()
    if head_dim & (head_dim - 1):  # SRHT exists for powers of two only
        recipes = {name: recipe for name, recipe in recipes.items() if recipe.rotation != "srht"}
    seconds = {name: [] for name in recipes}
    for _ in range(rounds):
        for name, recipe in recipes.items():
            seconds[name].append(_native.encode_bench(x.ctypes.data, vectors, head_dim, recipe, 1))
    return [
        {
            "backend": _native.backend(),
            "head_dim": head_dim,
            "recipe": name,
            "ns_per_vector": statistics.median(times) * 1e9 / vectors,
        }
        for name, times in seconds.items()
    ]


def held_bytes(cache) -> int:
    """Bytes a DynamicCache really holds: whole storages, each once (a sliding layer's view keeps all behind it)."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class DecodeArm:
    """One model and cache after a prefill, ready to decode greedily; both sides of a comparison run this loop."""

    def __init__(self, model, cache, prompt, implementation: str):
        self.model, self.cache, self.implementation = model, cache, implementation
        self.tokens = []
        self.last = self._step(prompt[None])

    def _step(self, ids):
        logits = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    def decode(self, count: int) -> float:
        """Seconds a token over `count` new tokens."""
        start = time.perf_counter()
        for _ in range(count):
            self.tokens.append(self.last)
            self.last = self._step(self.last)
        return (time.perf_counter() - start) / count


def make_arm(model, prompt, packed: bool, recipe="default") -> DecodeArm:
    """Prefills prompt [tokens] into an Int4Cache or a DynamicCache; the model is left on that side's attention."""
    from transformers import DynamicCache

    from .hf import Int4Cache

    implementation = "halfbyte" if packed else "sdpa"
    model.set_attn_implementation(implementation)
    cache = Int4Cache(model.config, recipe=recipe) if packed else DynamicCache(config=model.config)
    return DecodeArm(model, cache, prompt, implementation)


def decode_times(arms: dict, new_tokens: int, rounds: int) -> dict[str, float]:
    """Median over rounds of seconds a token; each round every arm decodes new_tokens, one arm after the other."""
    seconds = {name: [] for name in arms}
    for arm_round in range(rounds + 1):
        for name, arm in arms.items():
            arm.model.set_attn_implementation(arm.implementation)
            time.sleep(SETTLE_S)
            took = arm.decode(new_tokens if arm_round else 2)
            if arm_round:  # round 0 warms up
                seconds[name].append(took)
    return {name: statistics.median(times) for name, times in seconds.items()}


def generate_row(name: str, models: dict, prompt, new_tokens: int, rounds: int, recipe="default") -> dict:
    """One row of bench generate: {model, dtype, prefix, ..ms_per_token, ..cache_bytes}.

    models: {dtype name: model}. Each side is timed in every dtype and the quicker one counts; when they differ, dtype
    names both. fp_cache_bytes is the 16-bit cache's when there is one, whichever dtype was quicker.
    """
    arms = {
        (side, dtype): make_arm(model, prompt, side == "int4", recipe)
        for dtype, model in models.items()
        for side in ("fp", "int4")
    }
    seconds = decode_times(arms, new_tokens, rounds)
    best = {side: min(models, key=lambda dtype: seconds[side, dtype]) for side in ("fp", "int4")}
    sixteen_bit = next((dtype for dtype in models if dtype != "float32"), best["fp"])
    same = best["fp"] == best["int4"]
    return {
        "model": name,
        "dtype": best["fp"] if same else f"{best['fp']} / {best['int4']}",
        "prefix": prompt.numel(),
        "fp_ms_per_token": seconds["fp", best["fp"]] * 1e3,
        "int4_ms_per_token": seconds["int4", best["int4"]] * 1e3,
        "fp_cache_bytes": held_bytes(arms["fp", sixteen_bit].cache),
        "int4_cache_bytes": arms["int4", best["int4"]].cache.nbytes,
    }


def load_in_dtypes(name: str):
    """({"float32": model, "bfloat16": model}, tokenizer): the dtypes a CPU can be quick in."""
    import torch

    from .models import load_model

    model, tokenizer = load_model(name, "float32")
    half = copy.deepcopy(model)
    for weight in half.parameters():  # not half.to(): RoPE's frequencies stay float32, as when loaded in bfloat16
        weight.data = weight.data.to(torch.bfloat16)
    half.config.dtype = torch.bfloat16
    return {"float32": model, "bfloat16": half}, tokenizer


def check_room(name: str, config, tokens: int, new_tokens: int) -> None:
    """ValueError when a prefix and what follows it exceed the positions a model was made for."""
    room = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if room is not None and tokens + new_tokens > room:
        raise ValueError(f"prefix: {tokens} and {new_tokens} more tokens exceed the {room} positions of {name!r}")


def bench_generate(
    name: str, prefixes=(256, 1024, 4096), new_tokens=32, rounds=5, recipe="default", seed=0, progress=True
) -> list[dict]:
    """Rows {model, dtype, prefix, fp_ms_per_token, int4_ms_per_token, fp_cache_bytes, int4_cache_bytes}.

    Greedy decoding of one sequence after a prompt of random tokens: Int4Cache against DynamicCache with sdpa, each in
    float32 and bfloat16 with the quicker one counting, rounds of new_tokens tokens in turn, medians.
    """
    import torch
    from tqdm import tqdm

    recipe = get_recipe(recipe)
    models, _ = load_in_dtypes(name)
    check_room(name, models["float32"].config, max(prefixes), new_tokens * rounds + 2)
    vocabulary = models["float32"].config.get_text_config(decoder=True).vocab_size
    prompt = torch.randint(vocabulary, (max(prefixes),), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        return [
            generate_row(name, models, prompt[:prefix], new_tokens, rounds, recipe)
            for prefix in tqdm(prefixes, desc="bench generate", unit="prefix", disable=not progress, leave=False)
        ]
