"""Every mistake gets an error that names the argument, and leaves the cache as it was."""

import copy
import subprocess
import sys

import pytest

import halfbyte


def test_importing_halfbyte_does_not_import_torch():
    code = "import halfbyte, sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_without_torch_the_cache_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "halfbyte.hf", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"halfbyte.Int4Cache needs torch: pip install 'halfbyte\[hf\]'"):
        halfbyte.Int4Cache  # noqa: B018


torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: E402

from architectures import ARCHITECTURES  # noqa: E402
from halfbyte import Int4Cache, Int4StaticCache  # noqa: E402


@torch.no_grad()
def forward(model, ids, cache, attention="halfbyte", **options):
    model.set_attn_implementation(attention)
    return model(ids, past_key_values=cache, **options).logits


def state(cache):
    """All a cache holds, as tensors."""
    return [(layer.get_seq_length(), layer.keys, layer.values) for layer in cache.layers]


def assert_unchanged(cache, before):
    for (length, keys, values), (old_length, old_keys, old_values) in zip(state(cache), before, strict=True):
        assert length == old_length
        torch.testing.assert_close(keys, old_keys, rtol=0, atol=0)
        torch.testing.assert_close(values, old_values, rtol=0, atol=0)


@pytest.fixture
def cache(qwen, text):
    cache = Int4Cache(qwen.config)
    forward(qwen, text[:, :40], cache)
    return cache


def test_unknown_recipe(qwen):
    with pytest.raises(ValueError, match=r"int3.*default"):
        Int4Cache(qwen.config, recipe="int3")


def test_unknown_field_lists_the_fields(qwen):
    with pytest.raises(ValueError, match=r"sinks.*k_bits.*sink_tokens"):
        Int4Cache(qwen.config, sinks=16)


@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_widths_without_kernels_name_those_with(qwen, bits):
    with pytest.raises(ValueError, match=f"v_bits is {bits}; it takes 4 or 8, which have kernels"):
        Int4Cache(qwen.config, v_bits=bits)


@pytest.mark.parametrize("name", ["k3v3", "table", "kivi-4-g64"])
def test_simulated_recipes_are_no_caches(qwen, name):
    with pytest.raises(ValueError, match=rf"recipe is '{name}'.*default.*k8v4.*simulated, by `halfbyte eval` alone"):
        Int4Cache(qwen.config, name)


def test_not_a_config(qwen):
    with pytest.raises(ValueError, match="config"):
        Int4Cache("tiny-qwen")


def test_lambda_without_calibration(qwen):
    with pytest.raises(ValueError, match="calibration"):
        Int4Cache(qwen.config, recipe="paper-g32-lambda")


def test_dense_rotation_without_one_or_with_a_bad_one(qwen):
    from halfbyte.calibrate import Calibration

    with pytest.raises(ValueError, match=r"calibration: got None.* a dense rotation"):
        Int4Cache(qwen.config, rotation="dense")

    def feed(layer):
        layer.update(torch.zeros(1, 2, 4, 128), torch.zeros(1, 2, 4, 128))
        layer._settle()

    good, skewed = torch.eye(128), torch.eye(128) + 0.01
    for part, layer, message in (
        ([], 0, "layer 0.*set_rotation was not called"),
        ([good] * 3, 3, "layer 3.*got 3 layers"),
        ([good[:64]] * 4, 0, r"rotation_k of layer 0 has shape \[64, 128\], takes \[128, 128\]"),
        ([skewed] * 4, 0, "layer 0.*k is not orthonormal"),
    ):
        cache = Int4Cache(qwen.config, rotation="dense", calibration=Calibration([], [], [], [], rotation_k=part))
        with pytest.raises(ValueError, match=message):
            feed(cache.layers[layer])


@pytest.mark.parametrize("head_dim", [63, 514, 8])
@pytest.mark.parametrize("attention", ["halfbyte", "sdpa"])
def test_head_sizes_that_can_not_be_coded(attention, head_dim):
    config = Qwen2Config(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, hidden_size=2 * head_dim)
    config._attn_implementation = attention
    cache = Int4Cache(config)
    k = torch.zeros(1, 2, 4, head_dim)
    with pytest.raises(ValueError, match=f"layer 0.*{head_dim}"):
        cache.update(k, k, 0)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("attention", ["halfbyte", "sdpa"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tokens", [1, 5])
def test_values_that_are_not_finite(qwen, text, cache, attention, bad, tokens):
    before = state(cache)
    qwen.set_attn_implementation(attention)
    for layer in range(2):  # a forward pass that gets as far as layer 2
        cache.update(torch.randn(1, 2, tokens, 128), torch.randn(1, 2, tokens, 128), layer)
    k, v = torch.randn(1, 2, tokens, 128), torch.randn(1, 2, tokens, 128)
    v[0, 1, tokens - 1, 77] = bad
    with pytest.raises(ValueError, match=rf"layer 2.*V.*head 1.*token {39 + tokens}"):
        cache.update(k, v, 2)
    assert_unchanged(cache, before)
    forward(qwen, text[:, 40:45], cache, attention)


def test_a_first_prefill_that_is_not_finite_leaves_an_empty_cache(qwen, text):
    cache = Int4Cache(qwen.config)
    broken = copy.deepcopy(qwen)
    broken.model.layers[2].self_attn.k_proj.bias.data[130] = float("nan")
    with pytest.raises(ValueError, match=r"layer 2.*K.*head 1"):
        forward(broken, text[:, :30], cache)
    assert cache.get_seq_length() == 0
    assert all(layer.get_seq_length() == 0 for layer in cache.layers)
    forward(qwen, text[:, :30], cache)


@pytest.mark.parametrize("attention", ["halfbyte", "sdpa"])
def test_another_batch_dtype_or_shape(qwen, text, cache, attention):
    before = state(cache)
    with pytest.raises(ValueError, match=r"batch 2.*takes batch 1"):
        forward(qwen, text[:, :1].repeat(2, 1), cache, attention)
    k = torch.randn(1, 2, 1, 128)
    with pytest.raises(ValueError, match=r"bfloat16.*takes.*float32"):
        cache.update(k.bfloat16(), k.bfloat16(), 0)
    with pytest.raises(ValueError, match="value_states"):
        cache.update(k, k.bfloat16(), 0)
    with pytest.raises(ValueError, match=r"kv_heads 1.*takes.*kv_heads 2"):
        cache.update(k[:, :1], k[:, :1], 0)
    with pytest.raises(ValueError, match=r"head_dim 64.*takes.*head_dim 128"):
        cache.update(k[..., :64], k[..., :64], 0)
    with pytest.raises(ValueError, match="shapes"):
        cache.update(k, torch.randn(1, 2, 2, 128), 0)
    assert_unchanged(cache, before)


def test_a_dtype_that_can_not_be_held(qwen):
    k = torch.randn(1, 2, 1, 128, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"float64.*float32"):
        Int4Cache(qwen.config).update(k, k, 0)


def test_another_device(qwen, cache):
    before = state(cache)
    k = torch.empty(1, 2, 1, 128, device="meta")
    with pytest.raises(NotImplementedError, match=r"trace|device|meta"):
        cache.update(k, k, 0)
    assert_unchanged(cache, before)


@pytest.mark.parametrize("attention", ["halfbyte", "sdpa"])
def test_another_model(qwen, gemma, text, cache, attention):
    before = state(cache)
    with pytest.raises(ValueError, match=r"head_dim 256.*128"):
        forward(gemma, text[:, :30], cache, attention)
    assert_unchanged(cache, before)
    with pytest.raises(ValueError, match=r"head_dim 256.*128"):
        forward(gemma, text[:, :30], Int4Cache(qwen.config), attention)


def with_layers(qwen, count):
    config = copy.deepcopy(qwen.config)
    config.layer_types = ["full_attention"] * count
    config.num_hidden_layers = count
    return Qwen2ForCausalLM(config).eval()


@pytest.mark.parametrize("attention", ["halfbyte", "sdpa"])
def test_a_model_with_other_layers(qwen, text, cache, attention):
    before = state(cache)
    with pytest.raises(ValueError, match=r"layer 4.*4 layers"):
        forward(with_layers(qwen, 6), text[:, 40:45], cache, attention)
    assert_unchanged(cache, before)
    forward(with_layers(qwen, 3), text[:, 40:45], cache, attention)
    with pytest.raises(ValueError, match="layer 0 holds 45 tokens but layer 3 40"):
        forward(qwen, text[:, 45:46], cache, attention)


def test_an_encoder_decoder_without_a_pair_of_caches():
    model = ARCHITECTURES["bart"].build()
    model.set_attn_implementation("halfbyte")
    with pytest.raises(ValueError, match=r"takes EncoderDecoderCache\(Int4Cache\(config\), DynamicCache"):
        model.generate(torch.arange(3, 20)[None], past_key_values=Int4Cache(model.config), max_new_tokens=5)


def test_a_static_cache_for_fewer_layers(qwen, text):
    cache = Int4StaticCache(qwen.config, 60)
    forward(qwen, text[:, :40], cache)
    with pytest.raises(ValueError, match=r"layer 4.*4 layers"):
        forward(with_layers(qwen, 6), text[:, 40:45], cache)
    assert int(cache.get_seq_length()) == 40


@pytest.mark.parametrize("rows", [[2], [-1], [0.5], [True], [[0]], []])
def test_sequences_that_are_not_there(cache, rows):
    cache.batch_repeat_interleave(2)
    before = state(cache)
    with pytest.raises(ValueError, match=r"layer 0: got sequences \[.*\], takes some of 0 to 1"):
        cache.reorder_cache(torch.tensor(rows))
    assert_unchanged(cache, before)


def test_a_mask_of_another_size(qwen, text, cache):
    with pytest.raises(ValueError, match=r"attention_mask.*takes \[1 or 1, 1, 1, 41\]"):
        forward(qwen, text[:, 40:41], cache, attention_mask=torch.ones(1, 1, 1, 30, dtype=torch.bool))


def test_queries_that_do_not_fit(qwen, cache):
    keys, _ = cache.update(torch.randn(1, 2, 1, 128), torch.randn(1, 2, 1, 128), 0)
    layer = cache.layers[0]
    for query in (torch.randn(1, 3, 1, 128), torch.randn(1, 4, 1, 64), torch.randn(1, 4, 1, 128).half()):
        with pytest.raises(ValueError, match="query"):
            layer.attend(keys.step, query, None, None, None, None)


def test_attention_weights(qwen, text, cache):
    with pytest.raises(NotImplementedError, match="eager"):
        forward(qwen, text[:, 40:41], cache, output_attentions=True)


def test_compiling(qwen, text, cache):
    qwen.set_attn_implementation("halfbyte")
    step = text[:, 40:41]
    try:
        with pytest.raises(Exception, match="disable"), torch.no_grad():
            torch.compile(qwen, backend="eager", fullgraph=True)(step, past_key_values=copy.deepcopy(cache))
        with torch.no_grad():
            broken_up = torch.compile(qwen, backend="eager")(step, past_key_values=copy.deepcopy(cache)).logits
    finally:
        torch.compiler.reset()
    torch.testing.assert_close(broken_up, forward(qwen, step, cache), rtol=0, atol=1e-4)
