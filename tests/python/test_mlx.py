"""The cache for mlx-lm, on MLX's Linux build: against the library's own cache, and against the definition."""

import copy
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="MLX is not installed: pip install 'mlx[cpu]' mlx-lm")
pytest.importorskip("mlx_lm.models.cache", reason="mlx-lm is not installed")

import mlx.core as mx
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models import cache as library
from mlx_lm.models import gemma3_text, qwen2

from halfbyte import mlx_metal
from halfbyte.metal import HEAD_DIMS
from halfbyte.mlx import Int4KVCache, make_prompt_cache, use_packed_attention


@pytest.fixture(scope="module", params=["qwen2", "gemma3"])
def model(request):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 97, "rms_norm_eps": 1e-6, "model_type": request.param}
    mx.random.seed(0)
    if request.param == "qwen2":
        return qwen2.Model(
            qwen2.ModelArgs(**sizes, max_position_embeddings=512, rope_theta=1e4, tie_word_embeddings=True)
        )
    # Untrained norms make queries and keys long; this scale keeps the softmax from being one-hot all the same.
    options = {"head_dim": 32, "sliding_window": 24, "sliding_window_pattern": 2, "query_pre_attn_scalar": 512}
    return gemma3_text.Model(gemma3_text.ModelArgs(**sizes, **options))


def prompt(tokens, seed=1):
    return mx.array(np.random.default_rng(seed).integers(0, 97, tokens))


def logits_of(model, cache, ids, steps=()):
    """Logits of the last token of each step, the first being ids."""
    out = [model(ids[None], cache=cache)[0, -1]]
    out += [model(mx.array(step)[None], cache=cache)[0, -1] for step in steps]
    return np.array(mx.stack(out))


def relative(x, y):
    return np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2))


STEPS = [[3], [5], [7, 8, 9, 10, 11], [2], *([[n] for n in range(20)])]


@pytest.mark.parametrize("packed", [True, False])
def test_exact_recipe_gives_the_logits_of_the_librarys_cache(model, packed):
    """With values kept as they are, only float32 rounding is left: windows, masks, chunks and positions are right."""
    ids = prompt(37)
    want = logits_of(model, library.make_prompt_cache(model), ids, STEPS)
    got = logits_of(model, make_prompt_cache(model, "passthrough", packed), ids, STEPS)
    assert relative(got, want) < 1e-5


def test_default_recipe_is_close_and_both_ways_agree(model):
    ids = prompt(37)
    want = logits_of(model, library.make_prompt_cache(model), ids, STEPS)
    packed = logits_of(model, make_prompt_cache(model), ids, STEPS)
    dense = logits_of(model, make_prompt_cache(model, packed=False), ids, STEPS)
    assert 1e-4 < relative(packed, want) < 0.15  # four bits a value
    assert relative(packed, dense) < 0.03  # queries and weights in eight bits


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_attention_is_that_of_the_unpacked_states(dtype):
    mx.random.seed(3)
    cache = Int4KVCache(packed=True)
    k, v = (mx.random.normal((2, 2, 70, 64)).astype(dtype) for _ in "kv")
    cache.update_and_fetch(k, v)
    new_k, new_v = (mx.random.normal((2, 2, 3, 64)).astype(dtype) for _ in "kv")
    q = mx.random.normal((2, 6, 3, 64)).astype(dtype)
    old = copy.deepcopy(cache)._unpack(3)
    cache.update_and_fetch(new_k, new_v)
    k, v = (mx.concatenate(pair, axis=2) for pair in zip(old, (new_k, new_v), strict=True))
    want = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.125, mask="causal")
    got = cache.attend(q, new_k, new_v, 0.125)
    assert got.dtype == dtype
    assert got.shape == want.shape
    assert relative(np.array(got.astype(mx.float32)), np.array(want.astype(mx.float32))) < 0.03


def test_mask_and_sinks_reach_the_kernels():
    mx.random.seed(4)
    cache = Int4KVCache("passthrough", packed=True)
    k, v = (mx.random.normal((1, 2, 41, 32)) for _ in "kv")
    cache.update_and_fetch(k[:, :, :40], v[:, :, :40])
    cache.update_and_fetch(k[:, :, 40:], v[:, :, 40:])
    q, sinks = mx.random.normal((1, 4, 1, 32)), mx.array([0.0, 1.0, 2.0, -3.0])
    mask = mx.arange(41)[None] % 3 != 1
    want = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.2, mask=mask, sinks=sinks)
    got = cache.attend(q, k[:, :, 40:], v[:, :, 40:], 0.2, mask, sinks)
    assert relative(np.array(got), np.array(want)) < 1e-5
    with pytest.raises(NotImplementedError, match="adds to scores"):
        cache.attend(q, k, v, 0.2, mask.astype(mx.float32))
    with pytest.raises(NotImplementedError, match="between heads"):
        cache.attend(q, k, v, 0.2, mx.ones((1, 4, 1, 41), mx.bool_))


def test_generate_step_runs_on_it(model):
    ids = prompt(60)
    plain = [int(token) for token, _ in generate_step(ids, model, max_tokens=6, prefill_step_size=16)]
    cache = make_prompt_cache(model, "passthrough")
    got = [int(token) for token, _ in generate_step(ids, model, max_tokens=6, prefill_step_size=16, prompt_cache=cache)]
    assert got == plain
    assert cache[0].offset >= 60 + len(got) - 1  # the newest token need not be in the cache yet


def test_speculative_decoding_trims_it(model):
    if not library.can_trim_prompt_cache(make_prompt_cache(model)):
        pytest.skip("the model has sliding windows")
    ids = prompt(30)
    plain = [int(token) for token, _ in generate_step(ids, model, max_tokens=8)]
    caches = make_prompt_cache(model, "passthrough") + make_prompt_cache(model, "passthrough")
    step = speculative_generate_step(ids, model, model, num_draft_tokens=3, max_tokens=8, prompt_cache=caches)
    assert [int(token) for token, _, _ in step][:8] == plain


def test_saved_and_loaded_goes_on_with_the_same_bits(model, tmp_path):
    cache = make_prompt_cache(model)
    logits_of(model, cache, prompt(53))
    path = str(tmp_path / "cache.safetensors")
    library.save_prompt_cache(path, cache)
    loaded = library.load_prompt_cache(path)
    assert [type(c) for c in loaded] == [Int4KVCache] * 2
    assert [c.sliding_window for c in loaded] == [c.sliding_window for c in cache]
    for other in (loaded, copy.deepcopy(cache)):
        want = logits_of(model, copy.deepcopy(cache), mx.array([5]), [[6, 7], [8]])
        assert np.array_equal(logits_of(model, other, mx.array([5]), [[6, 7], [8]]), want)
    empty = Int4KVCache.from_state(Int4KVCache("g16", 3, 24).state, "")
    assert (empty.empty(), empty.recipe.k_group, empty.layer_index, empty.sliding_window) == (True, 16, 3, 24)


def test_trim_takes_tokens_back():
    mx.random.seed(5)
    cache = Int4KVCache("passthrough")
    k, v = (mx.random.normal((1, 1, 50, 32)) for _ in "kv")
    cache.update_and_fetch(k, v)
    assert cache.trim(7) == 7
    assert cache.offset == 43
    assert cache.size() == 43
    got = cache.update_and_fetch(k[:, :, 43:], v[:, :, 43:])
    assert mx.array_equal(got[0], k)
    assert mx.array_equal(got[1], v)
    assert cache.trim(99) == 50
    assert cache.empty()
    assert cache.nbytes == 0
    sliding = Int4KVCache("passthrough", sliding_window=24)
    sliding.update_and_fetch(k[:, :, :20], v[:, :, :20])
    assert sliding.is_trimmable()
    sliding.update_and_fetch(k[:, :, 20:], v[:, :, 20:])
    assert not sliding.is_trimmable()
    assert sliding.size() == 24


def test_bytes_are_a_quarter():
    cache, plain = Int4KVCache(), library.KVCache()
    k = mx.random.normal((1, 2, 2048, 128)).astype(mx.float16)
    for each in (cache, plain):
        each.update_and_fetch(k, k)
    assert 3.4 < plain.nbytes / cache.nbytes < 4


def test_make_prompt_cache_packs_layers_with_k_and_v_alone(model):
    kinds = [(type(c), c.sliding_window) for c in make_prompt_cache(model)]
    windows = [getattr(c, "max_size", 0) for c in library.make_prompt_cache(model)]
    assert kinds == [(Int4KVCache, window) for window in windows]


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="lambda or a dense rotation"):
        Int4KVCache("paper-g32-lambda")
    cache = Int4KVCache()
    k = mx.zeros((1, 2, 5, 32))
    with pytest.raises(ValueError, match=r"values: got shape \[1, 2, 4, 32\]"):
        cache.update_and_fetch(k, k[:, :, 1:])
    with pytest.raises(ValueError, match="keys: got mlx"):
        cache.update_and_fetch(k.astype(mx.int32), k.astype(mx.int32))
    cache.update_and_fetch(k, k)
    with pytest.raises(ValueError, match="the cache takes batch 1, kv_heads 2"):
        cache.update_and_fetch(k[:, :1], k[:, :1])
    with pytest.raises(ValueError, match="queries: got shape"):
        cache.attend(mx.zeros((1, 4, 1, 16)), k, k, 1.0)
    with pytest.raises(ValueError, match="holds a NaN"):
        cache.update_and_fetch(k + mx.array(float("nan")), k)
    assert cache.offset == 5
    with pytest.raises(ValueError, match="model: its modules"):
        use_packed_attention(mx_linear())


def mx_linear():
    import mlx.nn as nn

    return nn.Linear(2, 2)


# ------------------------------------------------------------------------------- the Metal kernels as MLX takes them


def test_every_entry_point_becomes_a_kernel_of_mlx():
    """Construction alone: without a Metal back-end MLX compiles nothing, and says so when one is called."""
    kernels = mlx_metal.kernels()
    names = [f"halfbyte_{what}_d{d}" for d in HEAD_DIMS for what in ("attend", "finish")]
    names += [f"halfbyte_{what}_d{d}_int{bits}" for d in HEAD_DIMS for what in ("encode", "decode") for bits in (4, 8)]
    assert sorted(kernels) == sorted(names)
    encode = kernels["halfbyte_encode_d80_int8"]
    assert encode.input_names == ["numbers", "limit", "data", "rotation", "offset", "lambda", "table"]
    assert encode.output_names == ["pool", "bad"]
    assert kernels["halfbyte_attend_d64"].output_names == ["partials"]
    assert "encode_entry<80, 8>" in encode.source
    assert "finish_floats(80, 96, 80)" in kernels["halfbyte_finish_d80"].source
    for kernel in kernels.values():
        made = mx.fast.metal_kernel(**kernel._asdict())
        if not mx.metal.is_available():
            with pytest.raises(RuntimeError, match="No Metal back-end"):
                made(inputs=[mx.zeros(8)] * len(kernel.input_names), grid=(32, 1, 1), threadgroup=(32, 1, 1),
                     output_shapes=[(8,)] * len(kernel.output_names),
                     output_dtypes=[mx.float32] * len(kernel.output_names))  # fmt: skip


TYPES = {"numbers": "int64_t", "table": "int64_t", "bad": "int", "pool": "uchar", "mask": "uchar"}


def signed_as_by_mlx(kernel):
    """The whole text with a signature as mx.fast.metal_kernel writes it, for arrays of eight elements or more."""
    names = [*kernel.input_names, *kernel.output_names]
    spaces = ["const device"] * len(kernel.input_names) + ["device"] * len(kernel.output_names)
    parameters = [
        f"{space} {TYPES.get(name, 'float')}* {name} [[buffer({i})]]"
        for i, (name, space) in enumerate(zip(names, spaces, strict=True))
    ]
    places = [f"uint3 {name} [[{name}]]" for name in ("threadgroup_position_in_grid", "thread_position_in_threadgroup")]
    return f"{kernel.header}\nkernel void {kernel.name}({', '.join(parameters + places)}) {{\n{kernel.source}}}\n"


def test_clang_accepts_their_types_and_address_spaces(tmp_path):
    clang = shutil.which("clang")
    if clang is None:
        pytest.skip("clang is not installed")
    shim = Path(__file__).parents[1] / "gpu" / "typecheck"
    command = [clang, "-x", "clcpp", "-cl-std=clc++2021", "-target", "spir64", "-Xclang", "-finclude-default-header"]
    command += ["-D__METAL_VERSION__=310", f"-I{shim}", "-fsyntax-only"]
    command += ["-Wno-unknown-attributes", "-Wno-unknown-pragmas"]
    kernels = mlx_metal.kernels()
    for name in ("encode_d80_int4", "decode_d128_int8", "attend_d64", "finish_d256"):
        file = tmp_path / f"{name}.metal"
        text = signed_as_by_mlx(kernels[f"halfbyte_{name}"])
        file.write_text(text)
        done = subprocess.run([*command, str(file)], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[:2000]
    file.write_text(
        text.replace("device const float* sinks_ = (device const float*)sinks", "thread float* sinks_ = sinks")
    )
    assert subprocess.run([*command, str(file)], capture_output=True, timeout=120).returncode != 0
