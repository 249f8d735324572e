"""Times what Python and its checks cost a decoding step: cache update and attention less the extension's own time."""

from __future__ import annotations

import statistics
import time
from types import SimpleNamespace
from unittest.mock import patch

from .bench import own_geometry, restored, uncalibrated

BLOCK_TOKENS = 16  # a packed block


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

    own_geometry(heads, kv_heads, head_dim)
    recipe = uncalibrated(recipe, "bench glue")
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
    rows = []
    with restored(), torch.inference_mode():
        torch.set_num_threads(1)
        for prefix in prefixes:
            prompt = random(kv_heads, prefix), random(kv_heads, prefix)
            arms = _glue_arms(config, inputs, prompt, recipe, Stopwatch())
            rows.append({"prefix": prefix} | _glue_row(arms, layers, new_tokens))
    return rows
