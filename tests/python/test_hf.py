"""Int4Cache and its layers as transformers uses them: handles, masks, crop, copies, and attention's odd options."""

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, Gemma2Config, GptOssConfig  # noqa: E402
from transformers.cache_utils import DynamicLayer  # noqa: E402

import halfbyte.layer  # noqa: E402
from halfbyte import Int4Cache, Int4StaticCache, _native  # noqa: E402
from halfbyte.attention import halfbyte_attention  # noqa: E402
from halfbyte.calibrate import Calibration  # noqa: E402
from halfbyte.offset import bias_offset  # noqa: E402

EIGHT = {"k_bits": 8, "v_bits": 8, "v_group": 32}


@torch.no_grad()
def forward(model, ids, cache, attention="halfbyte", **options):
    """Logits [batch, tokens, vocabulary]."""
    model.set_attn_implementation(attention)
    return model(ids, past_key_values=cache, **options).logits


def filled(model, ids, **overrides):
    cache = Int4Cache(model.config, **{**EIGHT, **overrides})
    forward(model, ids, cache)
    return cache


def test_it_is_a_dynamic_cache_with_layers_of_its_own(gemma):
    cache = Int4Cache(gemma.config)
    assert isinstance(cache, DynamicCache)
    assert cache.is_sliding == [True, False, True, False]
    assert cache.is_croppable
    assert not cache.is_compileable
    assert cache.get_max_length() == 256
    assert len(cache) == 4
    assert cache.nbytes == 0


def test_mask_sizes_are_those_of_dynamic_cache(gemma, text):
    ours, theirs = Int4Cache(gemma.config), DynamicCache(config=gemma.config)
    for begin, end in ((0, 200), (200, 201), (201, 255), (255, 256), (256, 300), (300, 301), (301, 600)):
        for layer in range(4):
            assert ours.get_mask_sizes(end - begin, layer) == theirs.get_mask_sizes(end - begin, layer)
            assert ours.get_seq_length(layer) == theirs.get_seq_length(layer)
        forward(gemma, text[:, begin:end], ours)
        forward(gemma, text[:, begin:end], theirs, "sdpa")


@pytest.fixture
def backend():
    """A function that sets the native backend until the test ends."""
    was = _native.backend()
    yield _native.set_backend
    _native.set_backend(was)


@pytest.mark.parametrize(("name", "tolerance"), [("reference", 1e-4), (None, 0.02)], ids=["reference", "fast"])
def test_multi_token_steps_equal_single_ones(model, text, backend, row_by_row, name, tolerance):
    """The block rule depends on positions alone; fast kernels round queries of single tokens to 8 bits."""
    backend(name or _native.backend())
    cache = filled(model, text[:, :250])
    other = copy.deepcopy(cache)
    together = forward(model, text[:, 250:287], cache)
    singly = torch.cat([forward(model, text[:, at : at + 1], other) for at in range(250, 287)], dim=1)
    torch.testing.assert_close(together, singly, rtol=0, atol=tolerance)
    assert (cache.layers[-1].keys - other.layers[-1].keys).abs().mean() < 1e-3


def test_handles_are_light_and_turn_into_tensors(qwen, text):
    cache = filled(qwen, text[:, :40])
    layer = cache.layers[0]
    before = layer.keys
    k, v = torch.randn(1, 2, 3, 128), torch.randn(1, 2, 3, 128)
    keys, values = cache.update(k, v, 0)
    assert not isinstance(keys, torch.Tensor)
    assert keys.shape == values.shape == (1, 2, 43, 128)
    assert keys.size(-2) == 43
    assert (keys.dtype, keys.device, keys.ndim) == (k.dtype, k.device, 4)
    dense = torch.cat([before, k], dim=2)
    torch.testing.assert_close(keys.transpose(2, 3), dense.transpose(2, 3), rtol=0, atol=0.2)
    assert torch.equal(keys[:, :, -3:], k)
    assert torch.equal(torch.cat([values, v], dim=2)[:, :, 40:43], v)
    query = torch.randn(1, 2, 3, 128)
    torch.testing.assert_close(query @ keys.mT, query @ keys.dense().mT)
    torch.testing.assert_close(keys * 2 - 1, 2 * keys.dense() - 1)
    cache.layers[0].crop(-1)
    with pytest.raises(RuntimeError, match="stand for 43 tokens"):
        cache.layers[0].attend(keys.step, torch.randn(1, 4, 3, 128), None, None, None, None)


def test_a_staged_prefill_is_packed_by_whatever_comes_next(qwen):
    qwen.set_attn_implementation("halfbyte")
    k, v = torch.randn(1, 2, 40, 128), torch.randn(1, 2, 40, 128)
    cache = Int4Cache(qwen.config, **EIGHT)
    keys, values = cache.update(k, v, 0)
    layer = cache.layers[0]
    assert torch.equal(keys.dense(), k)
    assert torch.equal(values + 0, v)
    assert layer.native.length == 0
    assert layer.get_seq_length() == 40
    assert torch.equal(layer.keys, k)
    layer.batch_repeat_interleave(2)
    assert layer.native.length == 40
    torch.testing.assert_close(layer.values, v.repeat(2, 1, 1, 1), rtol=0, atol=0.05)


@pytest.mark.parametrize("remove", [1, 5, 16, 37])
def test_crop_goes_back(model, text, remove):
    cache = filled(model, text[:, :250])
    cache.activate_past_recording()
    wanted = forward(model, text[:, 290:300], filled_on(model, text[:, :250], text[:, 250:290]))
    forward(model, text[:, 250:290], cache)
    forward(model, text[:, 400 : 400 + remove], cache)
    cache.crop(torch.tensor(-remove))
    assert cache.get_seq_length() == 290
    got = forward(model, text[:, 290:300], cache)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0.1)


def filled_on(model, *pieces):
    cache = filled(model, pieces[0])
    for piece in pieces[1:]:
        forward(model, piece, cache)
    return cache


def test_crop_forms(qwen, text):
    cache = filled(qwen, text[:, :50])
    cache.crop(0)
    assert cache.get_seq_length() == 50
    cache.crop(30)  # the older form: the length to keep
    assert cache.get_seq_length() == 30
    assert cache.layers[0].keys.shape == (1, 2, 30, 128)
    cache.crop(-100)
    assert cache.get_seq_length() == 0
    first = forward(qwen, text[:, :20], cache)
    torch.testing.assert_close(first, forward(qwen, text[:, :20], Int4Cache(qwen.config)), rtol=0, atol=1e-5)


def test_crop_past_the_window_needs_recording(gemma, text):
    cache = filled(gemma, text[:, :300])
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-3)
    cache.activate_past_recording()
    forward(gemma, text[:, 300:310], cache)
    assert cache.is_recording_past(0)
    cache.crop(-10)
    assert cache.get_seq_length() == 300
    assert cache.layers[0].native.visible < 256 + 64


@pytest.mark.parametrize("attention", ["halfbyte", "sdpa"])
def test_a_prefill_leaves_its_window_in_sliding_layers(gemma, text, attention):
    whole, cut = Int4Cache(gemma.config), Int4Cache(gemma.config)
    whole.activate_past_recording()
    gemma.set_attn_implementation(attention)
    with torch.inference_mode():
        logits = [gemma(text[:, :600], past_key_values=cache).logits for cache in (whole, cut)]
    assert torch.equal(*logits)
    assert [layer.native.visible for layer in whole.layers] == [600] * 4
    assert [layer.native.visible for layer in cut.layers] == [255, 600, 255, 600]
    assert cut.layers[0].nbytes < 0.55 * whole.layers[0].nbytes
    assert torch.equal(cut.layers[0].keys, whole.layers[0].keys[:, :, -255:])
    assert torch.equal(cut.layers[0].values, whole.layers[0].values[:, :, -255:])
    # A pass that fails in a later layer goes back to the end of the prefill, whose window is there.
    cut.update(*[torch.zeros(1, 1, 1, 256)] * 2, 0)
    with pytest.raises(ValueError, match="layer 3"):
        cut.update(*[torch.full((1, 1, 1, 256), torch.nan)] * 2, 3)
    assert cut.get_seq_length() == 600
    whole.layers[0].native.record_past(False)
    steps = [forward(gemma, text[:, 600:603], cache) for cache in (whole, cut)]
    torch.testing.assert_close(*steps, rtol=0, atol=1e-4)


def test_copies_are_independent_and_watch_the_same_config(model, text):
    cache = filled(model, text[:, :270])
    other = copy.deepcopy(cache)
    step = text[:, 270:271]
    wanted = forward(model, step, cache)
    forward(model, text[:, 300:340], cache)
    torch.testing.assert_close(forward(model, step, other), wanted, rtol=0, atol=1e-5)
    assert (cache.get_seq_length(), other.get_seq_length()) == (311, 271)
    model.set_attn_implementation("sdpa")
    k = torch.randn(1, *other.layers[0].keys.shape[1:2], 1, other.layers[0].head_dim_k)
    assert isinstance(other.layers[0].update(k, k)[0], torch.Tensor)


def test_rows_are_reordered_repeated_and_selected(model, text):
    """Tolerances: matrix products round differently by batch size, which tips a query's rounding to 8 bits."""
    ids = torch.cat([text[:, :270], text[:, 300:570]])
    step = text[:, 280:281]
    cache = filled(model, ids)
    wanted = forward(model, step.repeat(2, 1), copy.deepcopy(cache))
    swapped = copy.deepcopy(cache)
    swapped.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(forward(model, step.repeat(2, 1), swapped), wanted.flip(0), rtol=0, atol=0.02)
    for repeat, pick in ((3, torch.tensor([4, 0])), (3, torch.tensor([True, False, False, False, True, False]))):
        tree = copy.deepcopy(cache)
        tree.batch_repeat_interleave(repeat)
        assert tree.layers[0].keys.shape[0] == 6
        tree.batch_select_indices(pick)
        picked = torch.arange(2).repeat_interleave(repeat)[pick]
        torch.testing.assert_close(forward(model, step.repeat(2, 1), tree), wanted[picked], rtol=0, atol=0.02)
    one = copy.deepcopy(cache)
    one.batch_select_indices(torch.tensor([1]))
    torch.testing.assert_close(forward(model, step, one), wanted[1:], rtol=0, atol=0.02)


def test_reset_forgets_shape_and_dtype(qwen, text):
    cache = filled(qwen, text[:, :40].repeat(2, 1))
    cache.reset()
    assert cache.nbytes == 0
    assert cache.get_seq_length() == 0
    assert cache.layers[0].keys is None
    got = forward(qwen, text[:, :30], cache)
    torch.testing.assert_close(got, forward(qwen, text[:, :30], Int4Cache(qwen.config)), rtol=0, atol=1e-5)


def test_offload_and_prefetch_change_nothing_on_a_cpu(model, text):
    cache = filled(model, text[:, :200])
    wanted = forward(model, text[:, 200:205], copy.deepcopy(cache))
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    assert torch.equal(forward(model, text[:, 200:205], cache), wanted)


def test_keys_and_values_can_be_assigned(model, text):
    cache = filled(model, text[:, :300])
    dense = [(layer.keys, layer.values) for layer in cache.layers]
    theirs = DynamicCache(config=model.config)
    forward(model, text[:, :300], theirs, "sdpa")
    for layer, other, (keys, values) in zip(cache.layers, theirs.layers, dense, strict=True):
        assert keys.shape == other.keys.shape
        torch.testing.assert_close(keys, other.keys, rtol=0.02, atol=0.1)
        layer.keys = keys.clone()
        layer.values = values.clone()
        assert layer.get_seq_length() == 300
        torch.testing.assert_close(layer.keys, keys, rtol=0.02, atol=0.1)
    wanted = forward(model, text[:, 300:301], theirs, "sdpa")
    torch.testing.assert_close(forward(model, text[:, 300:301], cache), wanted, rtol=0, atol=0.3)
    layer.keys = layer.keys[:, :, 1:]
    with pytest.raises(RuntimeError, match="does not fit"):
        layer.crop(-1)


def test_a_copy_of_the_config_works_too(qwen, text):
    cache = Int4Cache(copy.deepcopy(qwen.config), **EIGHT)
    qwen.set_attn_implementation("halfbyte")
    cache._shared.config._attn_implementation = "sdpa"
    wanted = forward(qwen, text[:, :50], Int4Cache(qwen.config))
    torch.testing.assert_close(forward(qwen, text[:, :50], cache), wanted, rtol=0, atol=1e-5)
    assert cache._shared.config is qwen.config


def test_composite_models():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    small = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**small, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 64, "sliding_window": 8},
        vision_config={**small, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=60,
        boi_token_index=61,
        eoi_token_index=62,
    )
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    cache = Int4Cache(model.config, **EIGHT)
    for attention in ("sdpa", "halfbyte"):
        model.set_attn_implementation(attention)
        assert cache._shared.config._attn_implementation == attention
    ids = torch.randint(0, 50, (1, 40))
    forward(model, ids[:, :30], cache)
    got = forward(model, ids[:, 30:], cache)
    theirs = DynamicCache(config=model.config)
    forward(model, ids[:, :30], theirs, "sdpa")
    torch.testing.assert_close(got, forward(model, ids[:, 30:], theirs, "sdpa"), rtol=0, atol=0.02)


def small_model(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "sinks" in name or "q_proj.weight" in name or "k_proj.weight" in name:
            torch.nn.init.normal_(parameter, std=1.0)  # scores large enough for caps and sinks to matter
    return model


SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 20,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SMALL, attn_logit_softcapping=2.0, query_pre_attn_scalar=16),
        GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1),
    ],
    ids=["softcap", "sinks"],
)
def test_soft_capping_and_sinks_are_honoured(config, batch):
    model = small_model(config)
    ids = torch.randint(1, 64, (batch, 60))
    mask = torch.ones_like(ids)
    mask[-1, :5] = batch == 1
    ours, theirs = Int4Cache(model.config, **{**EIGHT, "k_group": 16, "v_group": 16}), DynamicCache(config=model.config)
    for begin, end in ((0, 40), (40, 41), (41, 50), (50, 51)):
        pieces = ids[:, begin:end], mask[:, :end]
        got = forward(model, pieces[0], ours, attention_mask=pieces[1])
        wanted = forward(model, pieces[0], theirs, "eager", attention_mask=pieces[1])
        shown = mask[:, begin:end].bool()
        torch.testing.assert_close(got[shown], wanted[shown], rtol=0, atol=1e-5 if begin == 0 else 0.1)
    plain = forward(model, ids, None, "halfbyte", use_cache=False)
    torch.testing.assert_close(plain, forward(model, ids, None, "eager", use_cache=False), rtol=0, atol=1e-5)


def masks(kind, queries, tokens):
    """A 4D mask for the newest queries, and what of it SDPA takes."""
    torch.manual_seed(1)
    shown = (torch.rand(1, 1, queries, tokens) < 0.7) | (torch.arange(tokens) == 0)
    additive = torch.zeros(shown.shape).masked_fill(~shown, torch.finfo(torch.float32).min)
    return {
        "bool": shown,
        "additive": additive,
        "biased": additive + torch.linspace(0, 1, tokens),
        "one row": shown[:, :, :1],
        "by head": shown & (torch.rand(1, 4, queries, tokens) < 0.8) | (torch.arange(tokens) == 0),
    }[kind]


@pytest.mark.parametrize("queries", [1, 6])
@pytest.mark.parametrize("kind", ["bool", "additive", "biased", "one row", "by head"])
def test_every_kind_of_mask(qwen, text, kind, queries):
    ours, theirs = filled(qwen, text[:, :50]), DynamicCache(config=qwen.config)
    forward(qwen, text[:, :50], theirs, "sdpa")
    mask = masks(kind, queries, 50 + queries)
    ids = text[:, 50 : 50 + queries]
    got = forward(qwen, ids, ours, attention_mask=mask)
    torch.testing.assert_close(got, forward(qwen, ids, theirs, "sdpa", attention_mask=mask), rtol=0, atol=0.1)


@pytest.mark.parametrize("options", [{"is_causal": False}, {"position_bias": True}, {"dropout": 1e-9}])
def test_what_the_kernels_can_not_do_runs_unpacked(qwen, text, options):
    cache = filled(qwen, text[:, :50])
    attention = qwen.model.layers[0].self_attn
    k, v, q = (torch.randn(1, heads, 4, 128) for heads in (2, 2, 4))
    if "position_bias" in options:
        options = {"position_bias": torch.randn(1, 4, 4, 54)}
    keys, values = cache.update(k, v, 0)
    got, _ = AttentionInterface()["halfbyte"](attention, q, keys, values, None, **options)
    scores = q @ keys.dense().repeat_interleave(2, 1).mT * 128**-0.5 + options.get("position_bias", 0)
    if options.get("is_causal", True):
        scores = scores.masked_fill(torch.arange(54) > torch.arange(50, 54)[:, None], -torch.inf)
    wanted = (scores.softmax(-1) @ values.dense().repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


def test_gradients_are_refused_not_dropped(qwen, text):
    cache = filled(qwen, text[:, :50])
    qwen.set_attn_implementation("halfbyte")
    loss = qwen(text[:, 50:52], past_key_values=cache).logits.sum()
    with pytest.raises(NotImplementedError, match="use_cache=False"):
        loss.backward()
    qwen(text[:, :20], use_cache=False).logits.sum().backward()
    assert qwen.model.embed_tokens.weight.grad is not None
    qwen.zero_grad()


def test_the_offset_of_a_short_prompt_comes_from_the_key_bias(qwen, text):
    attention = qwen.model.layers[1].self_attn
    offset = bias_offset(attention, Int4Cache(qwen.config)._shared, 2, 128)
    positions = torch.arange(2048)[None]
    cos, sin = qwen.model.rotary_emb(torch.zeros(1, 2048, 128), positions)
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    bias = attention.k_proj.bias.detach().view(1, 2, 1, 128).expand(1, 2, 2048, 128)
    turned = apply_rotary_pos_emb(bias, bias, cos, sin)[1].mean(2)[0]
    torch.testing.assert_close(offset, turned, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("tokens", "options", "used"), [(3, {}, 4), (16, {}, 0), (3, {"offset": False}, 0)])
def test_when_the_key_bias_is_used(qwen, text, monkeypatch, tokens, options, used):
    asked = []
    monkeypatch.setattr(halfbyte.layer, "bias_offset", lambda *args: asked.append(args) or bias_offset(*args))
    cache = Int4Cache(qwen.config, **options)
    forward(qwen, text[:, :tokens], cache)
    forward(qwen, text[:, tokens:40], cache)
    assert len(asked) == used
    assert all(layer.native.has_offset == cache.recipe.offset for layer in cache.layers)


def test_no_offset_from_weights_without_a_bias(gemma):
    assert bias_offset(gemma.model.layers[0].self_attn, Int4Cache(gemma.config)._shared, 1, 256) is None


@pytest.mark.parametrize("window", [0, 24])
def test_padding_does_not_enter_the_offset(qwen, window):
    """Whatever the padding holds, the packed tokens are the same bytes; without the mask they are not."""
    torch.manual_seed(0)
    k, v, q = (torch.randn(2, heads, 60, 128) for heads in (2, 2, 4))
    token = torch.arange(60)
    causal = (token <= token[:, None]) & (token > token[:, None] - (window or 60))
    real = torch.stack([token >= 0, token >= 30])
    mask = (causal & real[:, None])[:, None]
    packed = {}
    for garbage in (0.0, 9.0):
        for given in (mask, None):
            cache = Int4Cache(qwen.config)
            layer = cache.layers[0]
            cache._shared.config = copy.copy(qwen.config)
            cache._shared.config._attn_implementation = "halfbyte"
            fill = garbage * ~real[:, None, :, None]
            states = cache.update(k + fill, v + fill, 0)
            AttentionInterface()["halfbyte"](qwen.model.layers[0].self_attn, q, *states, given)
            packed[garbage, given is None] = layer.keys[1, :, 32:], layer.values[1, :, 32:]
    for part in range(2):
        assert torch.equal(packed[0.0, False][part], packed[9.0, False][part])
        assert not torch.equal(packed[0.0, True][part], packed[9.0, True][part])


def test_layers_of_other_kinds_are_the_librarys(text):
    config = Gemma2Config(**SMALL)
    config.layer_types = ["chunked_attention", "full_attention"]
    config.attention_chunk_size = 16
    cache = Int4Cache(config)
    assert isinstance(cache.layers[0], DynamicLayer)
    assert not isinstance(cache.layers[1], DynamicLayer)


def test_calibrated_offsets_are_used(qwen, text):
    zeros = [torch.zeros(2, 128) for _ in range(4)]
    calibration = Calibration(offset_k=zeros, offset_v=zeros)
    held = []
    for options in ({"calibration": calibration}, {"offset": False}, {}):
        cache = Int4Cache(qwen.config, **options)
        forward(qwen, text[:, :40], cache)
        held.append(cache.layers[1].keys)
    torch.testing.assert_close(held[0], held[1], rtol=0, atol=1e-6)
    assert not torch.allclose(held[0], held[2], rtol=0, atol=1e-2)
    short = Calibration(offset_k=zeros[:1], offset_v=zeros)
    with pytest.raises(ValueError, match="calibration"):
        forward(qwen, text[:, :2], Int4Cache(qwen.config, calibration=short))


def test_threads_follow_torch(qwen, text):
    threads, logits = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            cache = filled(qwen, text[:, :200])
            logits.append(forward(qwen, text[:, 200:201], cache))
            assert _native.num_threads() == count
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=0.02)


@pytest.mark.parametrize("make", [Int4Cache, lambda config: Int4StaticCache(config, 80)], ids=["dynamic", "static"])
def test_autocast(qwen, text, make):
    """Under it RoPE makes K float32, and V is bfloat16."""
    cache, theirs = make(qwen.config), DynamicCache(config=qwen.config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for begin, end in ((0, 60), (60, 61), (61, 64)):
            got = forward(qwen, text[:, begin:end], cache)
            want = forward(qwen, text[:, begin:end], theirs, "sdpa")
            assert (got - want).norm() < 0.05 * want.norm()
    assert cache.layers[0].keys.dtype is torch.float32


@pytest.mark.parametrize("make", [Int4Cache, lambda config: Int4StaticCache(config, 80)], ids=["dynamic", "static"])
def test_the_default_dtype_and_device_do_not_matter(qwen, text, make, tmp_path):
    """The C++ layer writes float32 to CPU memory, whatever PyTorch would make of an array without a dtype or device."""

    def run():
        """What comes of tensors that are all given; meta, the default device, has no memory to be written to."""
        generator = torch.Generator("cpu").manual_seed(1)
        cache = make(qwen.config)
        for tokens in (5, 40, 1):  # the offset comes from the key bias, as the first prompt is short
            for layer, module in enumerate(qwen.model.layers):
                k, v = torch.randn(2, 1, 2, tokens, 128, generator=generator, dtype=torch.float32, device="cpu")
                handles = cache.update(k, v, layer)
                query = k.repeat_interleave(2, 1)
                halfbyte_attention(module.self_attn, query, *handles, None)
        cache.reorder_cache(torch.tensor([0, 0], device="cpu"))
        cache.batch_select_indices([1])
        cache.save(tmp_path / "cache.safetensors")
        other = Int4Cache.load(tmp_path / "cache.safetensors", qwen.config)
        return [x for one in (copy.deepcopy(cache), other) for x in (one.layers[3].keys, one.layers[0].values)]

    qwen.set_attn_implementation("halfbyte")
    was, wanted = torch.get_default_dtype(), run()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            got = run()
    finally:
        torch.set_default_dtype(was)
    for tensor, same in zip(got, wanted, strict=True):
        assert torch.equal(tensor, same)
