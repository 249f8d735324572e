"""The Metal kernels in the cache for mlx-lm, on a stand-in for MLX's calls that runs the kernels in the emulator.

Not run on Apple hardware. Against the CPU's layers: counts, raw tokens, codes, attention; then a whole model.
"""

import copy
import random

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="MLX is not installed: pip install 'mlx[cpu]' mlx-lm")
pytest.importorskip("mlx_lm.models.cache", reason="mlx-lm is not installed")

import mlx.core as mx
from mlx_lm.models import cache as library
from mlx_lm.models import gemma3_text, qwen2

from halfbyte import mlx_layer
from halfbyte.mlx import CpuLayer, Int4KVCache, make_prompt_cache
from halfbyte.mlx_layer import MetalLayer
from halfbyte.recipes import get_recipe
from mlx_standin import pretend_metal


@pytest.fixture
def calls(monkeypatch):
    yield pretend_metal(monkeypatch)
    mlx_layer._kernel.cache_clear()


def relative(x, y):
    x, y = (np.array(z.astype(mx.float32)) for z in (x, y))
    return float(np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2)))


class Pair:
    """A layer of the CPU and one of the stand-in, given the same calls."""

    def __init__(self, recipe="default", d=64, dtype="float32", window=0, batch=1, **fields):
        self.recipe = get_recipe(recipe, **fields)
        self.config = {"kv_heads": 2, "head_dim_k": d, "head_dim_v": d, "dtype": dtype, "recipe": self.recipe}
        self.config |= {"layer_index": 1, "sliding_window": window}
        self.batch, self.d, self.dtype = batch, d, getattr(mx, dtype)
        self.cpu, self.metal = (kind(batch, **self.config) for kind in (CpuLayer, MetalLayer))
        self.chunk = None

    def random(self, heads, tokens):
        return mx.contiguous(mx.random.normal((self.batch, heads, tokens, self.d)).astype(self.dtype))

    def append(self, *counts):
        for count in counts:
            self.chunk = 2 * self.random(2, count), self.random(2, count) + 1
            for layer in (self.cpu, self.metal):
                layer.append(*self.chunk)
            if count <= 40:  # an emulator takes its time
                self.check_attention(count)

    def check_attention(self, count, group=3, mask=None, sinks=None, chunk=None):
        queries = self.random(2 * group, count)
        want, got = (x.attend(queries, chunk or self.chunk, 0.125, mask, sinks) for x in (self.cpu, self.metal))
        assert got.dtype == queries.dtype
        # The CPU's fast kernels round queries and weights to bytes.
        assert relative(got, want) < 0.03

    def check_parts(self):
        want, got = self.cpu.save(), self.metal.save()
        for name, part in want.items():
            if name.startswith(("raw", "page_table")) or not hasattr(part, "dtype"):
                assert np.array_equal(got[name], part), name
            elif name.startswith("offset"):
                assert np.allclose(got[name], part, atol=1e-6)
        # Within rounding of a tie a value may get the neighbouring code, a group another scale; fp32 scales round too.
        assert want["pages"].shape == got["pages"].shape
        if want["pages"].size and self.recipe.scale_bits == 16:
            assert np.mean(want["pages"] != got["pages"]) < 0.01
        assert self.metal.visible == self.cpu.visible
        held = self.cpu.visible
        for tokens in {held, max(held - 20, 1), 1}:
            for x, y in zip(self.metal.unpack(tokens), self.cpu.unpack(tokens), strict=True):
                assert x.shape == y.shape == (self.batch, 2, tokens, self.d)
                assert relative(x, y) < 0.02


@pytest.mark.parametrize(("recipe", "d", "dtype"), [("default", 64, "float16"), ("g16", 80, "float32"),
                                                    ("k8v4", 96, "bfloat16"), ("paper-g32", 128, "float32"),
                                                    ("no-sinks", 256, "float32")])  # fmt: skip
def test_appends_give_what_the_cpu_has(calls, recipe, d, dtype):
    pair = Pair(recipe, d, dtype, batch=2)
    pair.append(37, 1, 3, 20, *[1] * 13)
    pair.check_parts()
    bits = {pair.recipe.k_bits, pair.recipe.v_bits}
    assert set(calls) == {f"attend_d{d}", f"finish_d{d}"} | {
        f"{what}_d{d}_int{n}" for what in ("encode", "decode") for n in bits
    }


def test_any_order_of_operations_leaves_what_the_cpu_has(calls):
    chooser = random.Random(2)
    for window in (0, 40):
        pair = Pair("g32", window=window, raw_window=16)
        for _ in range(12):
            what = chooser.choice(("append", "append", "crop", "load", "copy"))
            if what == "crop" and pair.cpu.length and not window:
                length = chooser.randrange(1, pair.cpu.length + 1)
                for layer in (pair.cpu, pair.metal):
                    layer.crop(length)
            elif what == "load" and pair.cpu.length:
                pair.metal = MetalLayer.load(pair.metal.save(), **pair.config)
            elif what == "copy":
                old, pair.metal = pair.metal, pair.metal.copy()
                before = old.save()
            pair.append(chooser.choice((1, 1, 2, 15, 17, 40)))
            pair.check_parts()
            if what == "copy":
                assert all(np.array_equal(before[name], part) for name, part in old.save().items())


def test_pages_grow_and_a_window_lets_go_of_them(calls):
    pair = Pair("vector", window=70)
    pair.append(300, 100, 100, 100, 100, 1)
    pair.check_parts()
    assert pair.metal.pages.bytes.shape[1] < pair.metal.packed_end // 64 - 1
    assert pair.metal.sinks is None


def test_masks_and_sinks_reach_the_kernels(calls):
    pair = Pair(batch=2)
    pair.append(70)
    pair.append(1)
    sinks, mask = mx.full(6, 7.0), (mx.random.uniform(shape=(2, 1, 71)) < 0.4).astype(mx.uint8)
    plain = pair.metal.attend(queries := pair.random(6, 1), pair.chunk, 0.125)
    for options in ({"sinks": sinks}, {"mask": mask}):
        got = pair.metal.attend(queries, pair.chunk, 0.125, **options)
        assert relative(got, pair.cpu.attend(queries, pair.chunk, 0.125, **options)) < 0.03
        assert relative(got, plain) > 0.1


def test_a_value_that_can_not_be_coded_is_told_of_when_the_next_block_is_packed(calls):
    cache = Int4KVCache(packed=True)
    k = mx.zeros((1, 2, 40, 64)).at[0, 1, 20, 3].add(float("nan"))
    cache.update_and_fetch(k, mx.zeros_like(k))
    assert cache._layer.failed
    cache.update_and_fetch(k[:, :, :1], k[:, :, :1])
    with pytest.raises(ValueError, match="can not be coded"):
        cache.update_and_fetch(k[:, :, :16], k[:, :, :16])


def test_layers_without_kernels_stay_on_the_cpu(calls):
    for d, recipe in ((32, "default"), (64, "passthrough")):
        cache = Int4KVCache(recipe)
        cache.update_and_fetch(k := mx.zeros((1, 2, 5, d)), k)
        assert type(cache._layer) is CpuLayer
    assert calls == []


@pytest.mark.skipif(mx.metal.is_available(), reason="for machines without Metal")
def test_without_metal_everything_is_on_the_cpu():
    assert "not a GPU" in mlx_layer.why_not(64, 64, get_recipe("default"))


def tiny_model(kind):
    sizes = {"num_hidden_layers": 2, "intermediate_size": 96, "num_key_value_heads": 1, "vocab_size": 97}
    sizes |= {"rms_norm_eps": 1e-6, "model_type": kind}
    mx.random.seed(0)
    if kind == "qwen2":
        return qwen2.Model(qwen2.ModelArgs(**sizes, hidden_size=128, num_attention_heads=2, rope_theta=1e4,
                                           max_position_embeddings=512, tie_word_embeddings=True))  # fmt: skip
    options = {"head_dim": 64, "sliding_window": 24, "sliding_window_pattern": 2, "query_pre_attn_scalar": 512}
    return gemma3_text.Model(gemma3_text.ModelArgs(**sizes, **options, hidden_size=64, num_attention_heads=2))


@pytest.mark.parametrize("kind", ["qwen2", "gemma3"])
def test_a_model_gives_the_logits_of_the_cpu(kind, monkeypatch, tmp_path):
    model, steps = tiny_model(kind), [list(range(37)), [3], [5, 6, 7], [2], *([[n] for n in range(14)])]
    logits, caches = [], []
    for on_metal in (False, True):
        if on_metal:
            pretend_metal(monkeypatch)
        caches.append(make_prompt_cache(model))
        logits.append(mx.stack([model(mx.array([step]), cache=caches[-1])[0, -1] for step in steps]))
    assert [type(cache._layer) for cache in caches[1]] == [MetalLayer] * 2
    assert relative(logits[1], logits[0]) < 0.03
    library.save_prompt_cache(path := str(tmp_path / "cache.safetensors"), caches[1])
    for other in (library.load_prompt_cache(path), copy.deepcopy(caches[1])):
        want = model(mx.array([[7, 8]]), cache=copy.deepcopy(caches[1]))
        assert relative(model(mx.array([[7, 8]]), cache=other), want) < 1e-5
    mlx_layer._kernel.cache_clear()
