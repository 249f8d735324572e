"""How keys turn: what the config and code of each architecture say, against the keys it makes; and who gets to know."""

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    DynamicCache,
    EncoderDecoderCache,
    LlamaConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
)

from architectures import ARCHITECTURES, built  # noqa: E402
from halfbyte import Int4Cache, Int4StaticCache, shared  # noqa: E402
from halfbyte.calibrate import calibrate  # noqa: E402
from halfbyte.offset import bias_offset  # noqa: E402
from halfbyte.recipes import get_recipe  # noqa: E402
from halfbyte.rope import Rope, layer_rope, pairs_side_by_side  # noqa: E402

# Whose tokens differ though they are all the same: convolutions, recurrent states, a sink that takes attention away.
OWN_STATES = ("lfm2", "qwen3-next", "falcon-h1", "gpt-oss", "mimo-v2")
NOT_FOLLOWED = {"llama4": "pairs as complex numbers"}  # and in the library's own layer besides


def deviation(keys):
    """Of keys [heads, tokens, head_dim] from their mean over tokens, relative to their size."""
    return ((keys - keys.mean(1, keepdim=True)).norm() / keys.norm()).item()


@torch.no_grad()
def keys_of_one_token(name, tokens=20):
    """[(index, kind, keys [heads, tokens, head_dim])] of the layers that would be packed, for one token repeated."""
    model = built(name)
    model.set_attn_implementation(ARCHITECTURES[name].reference)
    ids = torch.full((1, tokens), 7)
    cache, inputs = DynamicCache(config=model.config), {"input_ids": ids}
    given = cache
    if model.config.is_encoder_decoder:
        given, inputs["decoder_input_ids"] = EncoderDecoderCache(cache, DynamicCache(config=model.config)), ids
    model(**inputs, past_key_values=given)
    for index, (layer, letter) in enumerate(zip(cache.layers, ARCHITECTURES[name].layers, strict=False)):
        if letter == "p":
            yield index, "sliding_attention" if layer.is_sliding else "full_attention", layer.keys[0].float()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_keys_turned_back_stand_still(name):
    """With the same token everywhere every layer sees the same everywhere: what differs between keys is RoPE alone."""
    config = built(name).config.get_text_config(decoder=True)
    for index, kind, keys in keys_of_one_token(name):
        rope = layer_rope(config, index, kind, keys.shape[-1])
        before = deviation(keys)
        if rope is None:
            assert before < 1e-4 or name.startswith("bart"), index  # bart adds positions to its inputs
            continue
        assert before > 0.2
        after = deviation(rope.turn(keys, -torch.arange(keys.shape[1])))
        assert after < (0.6 * before if name in OWN_STATES else 1e-4), index


def test_pairs_are_found_in_the_models_code():
    found = {name: pairs_side_by_side(built(name).config) for name in ("llama", "cohere2", "gpt-oss")}
    assert found == {"llama": False, "cohere2": True, "gpt-oss": False}
    assert pairs_side_by_side(PretrainedConfig()) is None


@pytest.mark.parametrize(
    ("config", "pairs"),
    [
        (LlamaConfig(), 64),
        (PhiConfig(), 16),  # half of its channels
        (LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), 64),
        (LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), 0),
        (Qwen2Config(rope_parameters={"rope_type": "of the future", "rope_theta": 1e4}), 0),
    ],
)
def test_only_steady_frequencies_are_followed(config, pairs):
    rope = layer_rope(config, 0, "full_attention", config.hidden_size // config.num_attention_heads)
    assert (0 if rope is None else rope.frequencies.numel()) == pairs


@pytest.mark.parametrize("interleaved", [False, True])
def test_turning_is_a_product_of_complex_numbers(interleaved):
    x = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(0))
    rope, position = Rope(torch.tensor([1.0, 0.1, 0.01, 0.0]), interleaved), torch.tensor([0, 1, 5, 1000, 100000])
    turned = rope.turn(x, position)
    pairs = (slice(0, 8, 2), slice(1, 8, 2)) if interleaved else (slice(0, 4), slice(4, 8))
    numbers, got = (torch.complex(y[..., pairs[0]], y[..., pairs[1]]) for y in (x, turned))
    angle = position[:, None].double() * rope.frequencies.double()
    torch.testing.assert_close(got, (numbers * torch.exp(1j * angle)).to(got.dtype), rtol=0, atol=1e-5)
    assert torch.equal(turned[..., 8:], x[..., 8:])


def told(cache):
    """What the first layer's kernels were told: frequencies, and the offset that was found or given."""
    parts = cache.layers[0].native.save()
    return parts["frequencies"], parts["offset_k"]


@pytest.mark.parametrize("make", [Int4Cache, lambda config, *args: Int4StaticCache(config, 256, *args)])
def test_layers_are_told(model, text, make):
    rope = layer_rope(model.config, 0, model.config.layer_types[0], model.config.head_dim)
    model.set_attn_implementation("halfbyte")
    for recipe, wanted in (("default", rope.frequencies), ("fixed-offset", torch.zeros(0))):
        cache = make(model.config, recipe)
        for _ in range(2):  # a layer that starts anew turns again
            with torch.no_grad():
                model(text[:, :80], past_key_values=cache)
            assert torch.equal(torch.from_numpy(told(cache)[0]), wanted)
            cache.reset()


@pytest.mark.parametrize(("recipe", "turning"), [("fixed-offset", 0), ("default", 64)])
def test_given_offsets_turn_if_they_were_made_to(qwen, text, recipe, turning):
    given = calibrate(qwen, text, progress=False, recipe=recipe, offsets=True)
    cache = Int4Cache(qwen.config, calibration=given)
    qwen.set_attn_implementation("halfbyte")
    with torch.no_grad():
        qwen(text[:, :80], past_key_values=cache)
    frequencies, offset = told(cache)
    assert frequencies.size == turning
    torch.testing.assert_close(torch.from_numpy(offset).view(2, 128), given.offset_k[0])


@pytest.mark.parametrize("offsets", [False, True])
def test_a_saved_cache_keeps_what_its_calibration_gave(qwen, text, offsets, tmp_path):
    recipe = get_recipe("default", lambda_=True)
    given = calibrate(qwen, text, progress=False, recipe=recipe, offsets=offsets)
    qwen.set_attn_implementation("halfbyte")
    caches = [Int4Cache(qwen.config, recipe, calibration=given)]
    with torch.no_grad():
        qwen(text[:, :9], past_key_values=caches[0])  # too short for a mean of its own
        caches[0].save(tmp_path / "cache")
        caches.append(Int4Cache.load(tmp_path / "cache", qwen.config))
        for cache in caches:
            cache.reset()
            qwen(text[:, 30:110], past_key_values=cache)
    first, second = (told(cache) for cache in caches)
    assert (first[0].size, (first[0] == second[0]).all(), (first[1] == second[1]).all()) == (64, True, True)
    assert torch.equal(torch.from_numpy(first[1]).view(2, 128), given.offset_k[0]) if offsets else True


def test_a_key_bias_is_averaged_around_the_middle_of_a_span(qwen, text):
    attention, shared = qwen.model.layers[0].self_attn, Int4Cache(qwen.config)._shared
    rope = layer_rope(qwen.config, 0, "full_attention", 128)
    bias = attention.k_proj.bias.detach().view(2, 1, 128)
    for span in (16, 64):
        wanted = rope.turn(bias.expand(-1, span, -1), torch.arange(span) - (span - 1) // 2).mean(1)
        torch.testing.assert_close(bias_offset(attention, shared, 2, 128, span), wanted, rtol=1e-4, atol=1e-3)
    cache = Int4Cache(qwen.config)
    qwen.set_attn_implementation("halfbyte")
    with torch.no_grad():
        qwen(text[:, :9], past_key_values=cache)
        qwen(text[:, 9:40], past_key_values=cache)
    frequencies, offset = told(cache)
    assert frequencies.size == 64
    torch.testing.assert_close(torch.from_numpy(offset).view(2, 128), bias_offset(attention, shared, 2, 128, 64))


def test_layers_share_positions_where_they_have_the_same(monkeypatch):
    """One answer serves all layers of a kind, unless a layer has a config, or positions, of its own."""
    monkeypatch.setattr(shared, "layer_rope", lambda config, layer_idx, kind, head_dim: layer_idx)

    def asked_for(config):
        held = shared.Shared(config)
        layers = [SimpleNamespace(is_sliding=index == 1, layer_idx=index) for index in range(4)]
        return [held.rope(layer, 64) for layer in layers]

    alike, without = SimpleNamespace(), SimpleNamespace(no_rope_layers=[1, 1, 1, 0])
    assert asked_for(alike) == [0, 1, 0, 0]
    assert asked_for(without) == [0, 1, 2, 3]
    alike.per_layer_config = [alike] * 4
    assert asked_for(alike) == [0, 1, 0, 0]
    alike.per_layer_config = [alike, alike, SimpleNamespace(), alike]
    assert asked_for(alike) == [0, 1, 2, 0]
