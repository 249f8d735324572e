"""Int4StaticCache: the tokens of Int4Cache under a fixed capacity, and torch.compile without a graph break."""

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402

from halfbyte import Int4Cache, Int4StaticCache  # noqa: E402
from halfbyte.static import append_and_attend  # noqa: E402

CAPACITY = 400


def generate(model, ids, cache, new=24, **options):
    model.set_attn_implementation("halfbyte")
    return model.generate(ids, past_key_values=cache, max_new_tokens=new, **{"do_sample": False, **options})


@torch.no_grad()
def forward(model, ids, cache, **options):
    model.set_attn_implementation("halfbyte")
    return model(ids, past_key_values=cache, **options).logits


@pytest.mark.parametrize("recipe", ["passthrough", "default"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "sampling"])
def test_it_gives_the_tokens_of_int4_cache(model, text, recipe, options):
    ids = torch.cat([text[:, :300], text[:, 200:500]])
    results = []
    for cache in (Int4Cache(model.config, recipe), Int4StaticCache(model.config, CAPACITY, recipe)):
        torch.manual_seed(5)
        results.append(generate(model, ids, cache, **options))
    assert torch.equal(*results)


def test_left_padding(model, text):
    ids, mask = text[:, :300].repeat(2, 1), torch.ones(2, 300, dtype=torch.long)
    mask[1, :70] = 0
    wanted = generate(model, ids, Int4Cache(model.config), attention_mask=mask)
    assert torch.equal(generate(model, ids, Int4StaticCache(model.config, CAPACITY), attention_mask=mask), wanted)


@pytest.mark.parametrize("prompt", [100, 300])  # shorter and longer than the window, which is shorter than the room
@pytest.mark.parametrize("padded", [0, 2])
def test_a_prompt_gets_the_attention_of_int4_cache(model, text, monkeypatch, prompt, padded):
    """PyTorch is asked for the very same: with a mask in place of none, a GPU takes kernels that round otherwise."""
    calls = []

    def record(*states, attn_mask, sdpa=torch.nn.functional.scaled_dot_product_attention, **options):
        calls.append(([*states, attn_mask], options))
        return sdpa(*states, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    shown = torch.ones(1, prompt, dtype=torch.long)
    shown[:, :padded] = 0
    for cache in (Int4StaticCache(model.config, CAPACITY), Int4Cache(model.config)):
        forward(model, text[:, :prompt], cache, attention_mask=shown)
    layers = len(calls) // 2
    assert layers == len(cache.layers)
    for (tensors, options), (wanted, options_wanted) in zip(calls[:layers], calls[layers:], strict=True):
        assert options == options_wanted
        for got, want in zip(tensors, wanted, strict=True):
            assert (got is None) == (want is None)
            assert got is None or (torch.equal(got, want) and got.stride() == want.stride())


def test_memory_is_allocated_once_and_reset_keeps_it(model, text):
    cache = Int4StaticCache(model.config, CAPACITY)
    forward(model, text[:, :289], cache)
    forward(model, text[:, 289:290], cache)
    held = [layer.native.nbytes for layer in cache.layers]
    for at in range(290, 350):
        forward(model, text[:, at : at + 1], cache)
    # What a step of several tokens keeps raw for a crop is gone; a page would be seen.
    page = 64 * 2 * cache.layers[0].head_dim_k * cache.layers[0].kv_heads // 2
    assert all(abs(layer.native.nbytes - was) < page for layer, was in zip(cache.layers, held, strict=True))
    first = generate(model, text[:, :40], Int4StaticCache(model.config, CAPACITY))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(model, text[:, :40], cache), first)


def test_capacity_is_an_error_not_a_crash(qwen, text):
    cache = Int4StaticCache(qwen.config, 64)
    forward(qwen, text[:, :60], cache)
    with pytest.raises(ValueError, match=r"60 tokens and 5 more exceed max_cache_len=64"):
        forward(qwen, text[:, 60:65], cache)
    assert int(cache.get_seq_length()) == 60
    other = Int4Cache(qwen.config)
    forward(qwen, text[:, :60], other)
    ids = text[:, 60:64]
    torch.testing.assert_close(forward(qwen, ids, cache), forward(qwen, ids, other), rtol=0, atol=0)


@pytest.mark.parametrize("capacity", [0, -1, "many", None])
def test_bad_capacity(qwen, capacity):
    with pytest.raises(ValueError, match="max_cache_len"):
        Int4StaticCache(qwen.config, capacity)


def test_other_attention_implementations_are_refused(qwen, text):
    qwen.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="set_attn_implementation"):
        qwen(text[:, :20], past_key_values=Int4StaticCache(qwen.config, 64))


def test_a_value_that_is_not_finite_leaves_the_cache_as_it_was(qwen, text):
    cache = Int4StaticCache(qwen.config, CAPACITY)
    forward(qwen, text[:, :50], cache)
    layer = cache.layers[1]
    bad = torch.full((1, 2, 1, 128), float("nan"))
    query = torch.zeros(1, 4, 1, 128)
    state = layer.state.clone()
    with pytest.raises(ValueError, match="NaN"):
        append_and_attend(query, bad, bad, None, state, True, None, None, None, True)
    assert layer.seen == 50
    assert layer.state.tolist() == state.tolist()


def test_crop_and_copies(model, text):
    cache = Int4StaticCache(model.config, CAPACITY)
    forward(model, text[:, :200], cache)
    other = copy.deepcopy(cache)
    cache.activate_past_recording()
    ahead = forward(model, text[:, 200:210], cache)
    cache.crop(-10)
    assert int(cache.get_seq_length()) == 200
    torch.testing.assert_close(forward(model, text[:, 200:210], cache), ahead, rtol=0, atol=1e-4)
    torch.testing.assert_close(forward(model, text[:, 200:210], other), ahead, rtol=0, atol=0)


def test_a_file_fits_both_classes(model, text, tmp_path):
    cache = Int4Cache(model.config)
    forward(model, text[:, :200], cache)
    cache.save(tmp_path / "cache.safetensors")
    static = Int4StaticCache.load(tmp_path / "cache.safetensors", model.config, max_cache_len=CAPACITY)
    for at in range(200, 230):
        ids = text[:, at : at + 1]
        assert torch.equal(forward(model, ids, static), forward(model, ids, cache))
    with pytest.raises(ValueError, match=r"max_cache_len: got 100; the cache file .* holds 200 tokens"):
        Int4StaticCache.load(tmp_path / "cache.safetensors", model.config, max_cache_len=100)


def test_early_initialization(qwen, text):
    cache = Int4StaticCache(qwen.config, CAPACITY)
    cache.early_initialization(1, 2, 128, torch.float32, torch.device("cpu"))
    assert cache.is_initialized
    other = Int4StaticCache(qwen.config, CAPACITY)
    assert torch.equal(forward(qwen, text[:, :50], cache), forward(qwen, text[:, :50], other))


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(qwen, text, tokens, masked):
    cache = Int4StaticCache(qwen.config, 128)
    forward(qwen, text[:, :50], cache)
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, heads, tokens, 128, generator=generator) for heads in (4, 2, 2))
    mask = (torch.arange(128) <= 50 + torch.arange(tokens)[:, None])[None, None] if masked else None
    arguments = query, key, value, mask, cache.layers[0].state.clone(), True, 0.1, None, None, True
    torch.library.opcheck(append_and_attend, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["forward", "generate"])
def test_compiled_decoding_gives_the_tokens_of_eager_decoding(qwen, text, mode):
    torch.compiler.reset()
    try:
        if mode == "forward":
            _check_compiled_steps(qwen, text)
        else:
            _check_compiled_generate(qwen, text)
    finally:
        torch.compiler.reset()


@torch.no_grad()
def _check_compiled_steps(model, text):
    """Across a block and a page, then on a second cache: one graph, compiled once."""
    model.set_attn_implementation("halfbyte")
    cache, eager = (Int4StaticCache(model.config, CAPACITY) for _ in range(2))
    compiler = CompileCounterWithBackend("inductor")
    step = torch.compile(model.forward, backend=compiler, fullgraph=True)
    for prompt in (180, 90):
        cache, eager = (Int4StaticCache(model.config, CAPACITY) for _ in range(2))
        forward(model, text[:, :prompt], cache)
        forward(model, text[:, :prompt], eager)
        for at in range(prompt, prompt + 30):
            ids = text[:, at : at + 1]
            logits = step(ids, past_key_values=cache).logits
            torch.testing.assert_close(logits, forward(model, ids, eager), rtol=0, atol=2e-2)
        assert int(cache.get_seq_length()) == prompt + 30
    assert compiler.frame_count == 1


def _check_compiled_generate(model, text):
    from transformers import CompileConfig

    compiled = CompileConfig(fullgraph=True)
    compiled._compile_all_devices = True  # the library compiles on accelerators alone unless told otherwise
    wanted = generate(model, text[:, :100], Int4StaticCache(model.config, CAPACITY, "passthrough"))
    cache = Int4StaticCache(model.config, CAPACITY, "passthrough")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch.equal(generate(model, text[:, :100], cache, compile_config=compiled), wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs


def test_other_devices_are_refused(qwen):
    qwen.set_attn_implementation("halfbyte")
    cache = Int4StaticCache(qwen.config, max_cache_len=64)
    states = torch.empty(1, 2, 5, 128, device="meta")
    with pytest.raises(NotImplementedError, match="key_states on meta: takes CPU tensors"):
        cache.update(states, states, 0)
