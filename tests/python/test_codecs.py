"""Simulated codecs: ours against the kernels, others against their formulas and their known errors."""

import itertools

import pytest
import torch
from transformers.models.qwen2.modeling_qwen2 import rotate_half

from halfbyte import Int4Cache
from halfbyte.codecs import Codec, Linear, Packed, PerLayer, Side, Sinks, Table, both, round_trip
from halfbyte.peers import PEERS, Affine, Float8, Gaussian, HalfQuadratic, MicroFloat, RowColumn, gaussian_levels
from halfbyte.recipes import get_recipe
from halfbyte.simulated import LEVELS, SIMULATED, packed, turning


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loss(quantiser, x):
    """Squared error over the square of x."""
    return ((quantiser(x) - x).square().sum() / x.square().sum()).item()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [16, 32, 64, 0])
@pytest.mark.parametrize(("search", "signed"), [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize("head_dim", [32, 96])
def test_linear_codes_are_those_of_the_kernels(bits, group, search, signed, head_dim):
    x = normal(2, 37, head_dim)
    recipe = get_recipe("default", k_bits=bits, k_group=group, search=search, signed_scale=signed)
    side = Side(Linear(bits, group, search, signed), offset=0)
    packed, simulated = round_trip(x, recipe, "k", 3), side.apply(x, 3)
    # A tie in float32 may fall either way and give the next code, so a few values may differ, none by more than a step.
    assert ((packed - simulated).abs() > 1e-4).any(-1).float().mean() < 0.02
    assert (packed - simulated).abs().max() < x.abs().max() / 2 ** (bits - 2)


def test_offset_and_lambda_are_taken_off_and_put_back():
    x = normal(2, 40, 64) + 30 * normal(2, 1, 64, seed=1)
    lambda_ = normal(2, 64, seed=2).abs() + 0.5
    mean = x[:, :16].mean(1).contiguous()
    recipe = get_recipe("default", lambda_=True)
    expected = round_trip(x, recipe, "k", 1, mean, lambda_)
    by_count = Side(Linear(), offset=16, lambda_=[None, lambda_]).apply(x, 1)
    given = Side(Linear(), offset=[None, mean], lambda_=[None, lambda_]).apply(x, 1)
    assert torch.equal(by_count, given)
    assert ((by_count - expected).abs() > 1e-3).float().mean() < 0.01
    assert (by_count - x).norm() < 0.15 * normal(2, 40, 64).norm()


def test_a_turning_offset_follows_a_constant_through_rope(qwen):
    """Constant keys before the model's own RoPE are nothing but offset, at whatever position."""
    constant = 30 * normal(2, 1, 128)
    cos, sin = qwen.model.rotary_emb(constant, torch.arange(1000)[None])
    keys = (constant * cos + rotate_half(constant) * sin).detach()
    exact = turning(qwen.config, 1)
    torch.testing.assert_close(exact.of(keys, 0), keys, rtol=1e-3, atol=1e-2)
    slow = 32  # of the 64 pairs: what turns by less than a right angle in half a span is followed
    near, far = turning(qwen.config, 64).of(keys, 0) - keys, keys[:, :256].mean(1, keepdim=True) - keys
    assert near[..., slow:64].norm() < 0.3 * far[..., slow:64].norm()
    assert near.norm() < far.norm()
    noisy = keys + normal(2, 1000, 128, seed=1)
    assert (Side(Linear(), offset=exact).apply(noisy, 0) - noisy).square().mean() < 0.01
    assert (Side(Linear(), offset=256).apply(noisy, 0) - noisy).square().mean() > 1


@pytest.mark.parametrize("recipe", ["default", "turning", "fixed-offset"])
def test_offsets_are_those_of_a_cache(model, recipe):
    """The codec of an evaluation gives back what a cache does, whichever way its offset goes."""
    config, tokens = model.config, 289  # the last one stays raw
    heads, head_dim = config.num_key_value_heads, config.head_dim
    model.set_attn_implementation("sdpa")  # under which an update packs at once
    cache = Int4Cache(config, recipe)
    codec = packed(get_recipe(recipe), config, tokens=tokens)
    for index, layer in enumerate(cache.layers):
        bias = rope_of(cache, index).turn(20 * normal(heads, 1, head_dim).expand(-1, tokens, -1), torch.arange(tokens))
        keys = normal(heads, tokens, head_dim, seed=1) + bias
        layer.record_past = True
        cache.update(keys[None], keys[None], index)
        for which, held in (("k", layer.keys[0]), ("v", layer.values[0])):
            differ = (held - codec(keys, index, which)).abs() > 1e-3
            assert differ[:, :288].any(-1).float().mean() < 0.02, (index, which)  # a tie may fall either way


def rope_of(cache, index):
    layer = cache.layers[index]
    return cache._shared.rope(layer, cache._shared.config.head_dim)


def test_matrices_stand_for_a_rotation_and_need_not_be_orthogonal():
    x = normal(2, 20, 32)
    skewed = torch.eye(32) + 0.1 * normal(32, 32, seed=1)
    side = Side(lambda y: y, [(skewed, torch.linalg.inv(skewed))], offset=0)
    torch.testing.assert_close(side.apply(x, 0), x, rtol=1e-4, atol=1e-4)
    seen = []
    Side(lambda y: seen.append(y) or y, [(skewed, torch.linalg.inv(skewed))], offset=0).apply(x, 0)
    torch.testing.assert_close(seen[0], torch.einsum("ij,htj->hti", skewed, x))


def test_fewer_bits_lose_more():
    x = normal(4, 64, 64)
    losses = [loss(Linear(bits, 32), x) for bits in (2, 3, 4, 6, 8)]
    assert losses == sorted(losses, reverse=True)
    assert losses[2] == pytest.approx(0.0067, rel=0.05)  # docs/decisions/signed-scales.md
    assert all(2.5 < more / less < 25 for more, less in itertools.pairwise(losses))


def test_a_table_of_even_levels_is_linear():
    x = normal(2, 20, 64)
    even = Table(tuple(code / 8 for code in range(-8, 8)), 32)
    torch.testing.assert_close(even(x), Linear(4, 32)(x), rtol=1e-4, atol=1e-4)
    assert even.bits_per_value(64) == Linear(4, 32).bits_per_value(64) == 4.5


def test_the_trained_table_loses_less_than_even_levels():
    x = normal(8, 100, 128)
    assert loss(Table(LEVELS, 32), x) < 0.9 * loss(Linear(4, 32), x)
    assert loss(Table(LEVELS, 0), x) < 0.9 * loss(Linear(4, 0), x)


def test_every_simulated_recipe_fits_both_models(qwen, gemma):
    for model, x in ((qwen, normal(2, 20, 128)), (gemma, normal(1, 20, 256))):
        for name, make in SIMULATED.items():
            codec = make(model.config)
            assert 2 < codec.bits_per_value(x.shape[-1]) < 7
            assert (codec(x, 1, "k") - x).square().mean() < (0.3 if "2" in name[:4] else 0.1), name


def test_first_tokens_stay_raw_where_asked():
    x = normal(1, 40, 32)
    recipe = get_recipe("default", sink_tokens=16)
    for codec in (Packed(recipe), Sinks(both(Linear(4, 32)), 16)):
        out = codec(x, 0, "k")
        assert torch.equal(out[:, :16], x[:, :16])
        assert 0 < (out[:, 16:] - x[:, 16:]).abs().max() < 1
        assert torch.equal(codec.with_seed(1)(x, 0, "k")[:, :16], x[:, :16])


def test_layers_may_have_their_own_codec():
    x = normal(1, 16, 32)
    wide, narrow = both(Linear(8, 0), offset=0), both(Linear(2, 0), offset=0)
    mixed = PerLayer(narrow, {0: wide, -1: wide}, layers=4)
    for layer in range(4):
        assert torch.equal(mixed(x, layer, "k"), (wide if layer in (0, 3) else narrow)(x, layer, "k"))
    assert mixed.bits_per_value(32) == 5.5
    assert not torch.equal(mixed.with_seed(1)(x, 1, "k"), mixed(x, 1, "k"))


def test_affine_codes_run_along_channels_or_tokens():
    x = normal(1, 70, 48)
    x[:, :, 5] += 100  # a channel far off: cheap along the tokens, dear along the channels
    assert loss(Affine(4, 32, "tokens"), x) < 1e-4 < 1e-3 < loss(Affine(4, 32, "channels"), x)
    group = x[0, :32, 7]
    step = (group.max() - group.min()) / 15
    codes = (Affine(4, 32, "tokens")(x)[0, :32, 7] - group.min()) / step
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=0.02)  # scale and minimum are fp16
    assert (codes.round() - (group - group.min()) / step).abs().max() < 0.52
    # Tokens that fill no group are coded with a range of their own.
    assert (Affine(4, 32, "tokens")(x)[:, 64:] - x[:, 64:]).abs().max() < 0.3
    assert Affine(4, 32).bits_per_value(48) == 5.0


def test_half_quadratic_steps_lower_their_own_error():
    x = normal(1, 50, 64) ** 3
    plain, moved = (((q(x) - x).abs() ** 0.7).sum() for q in (Affine(4, 64), HalfQuadratic(4, 64)))
    assert moved < plain


def test_gaussian_levels_have_the_known_error():
    # Max 1960: 0.1175, 0.03454, 0.009497 for 4, 8, 16 levels.
    for bits, expected in ((2, 0.1175), (3, 0.03454), (4, 0.009497)):
        levels = torch.tensor(gaussian_levels(bits))
        assert torch.allclose(levels, -levels.flip(0), atol=1e-6)
        assert loss(Gaussian(bits), normal(8, 200, 128)) == pytest.approx(expected, rel=0.06)


def test_row_and_column_scales_are_found_and_put_back():
    x, factors = normal(1, 64, 32), normal(1, 64, 1, seed=1).exp() * normal(1, 1, 32, seed=2).exp()
    for along in ("tokens", "channels"):
        # Whatever rows and columns are multiplied by comes off before coding and back after it.
        alike = (RowColumn(4, 64, along)(x * factors) / factors - RowColumn(4, 64, along)(x)).abs() < 0.01
        assert alike.float().mean() > 0.95  # fp16 factors tip a few codes over
        assert (Affine(4, 64, along)(x * factors) / factors - Affine(4, 64, along)(x)).abs().mean() > 0.1
    one = normal(1, 1, 32)  # a tile of one token has no deviation along the tokens
    assert torch.isfinite(RowColumn(4, 64)(one)).all()


def test_small_floats_round_as_their_formats_do():
    e4m3 = Float8()(torch.tensor([1.0, 1.06, 1.07, 500.0, 2.0**-9]))
    assert e4m3.tolist() == [1.0, 1.0, 1.125, 448.0, 2.0**-9]
    block = torch.tensor([6.0, 5.1, 4.9, 2.6, 1.2, 0.7, 0.2, -0.3] + [0.0] * 24)[None, None]
    assert MicroFloat(32)(block)[0, 0, :8].tolist() == [6.0, 6.0, 4.0, 3.0, 1.0, 0.5, 0.0, -0.5]
    assert MicroFloat(16)(block * 64)[0, 0, 0].item() == 384.0


def test_every_peer_keeps_most_of_a_normal_vector_at_the_bits_it_states():
    x = normal(1, 256, 128)
    expected = {"quanto-int4": 4.5, "kivi-4-g32": 5.0, "kivi-2-g32": 3.0, "q4_0": 4.5, "q4_1": 5.0, "q8_0": 8.5,
                "turboquant-4": 4.125, "kvarn-4": 4.375, "nvfp4": 4.5, "mxfp4": 4.25, "fp8-e4m3": 8.0}  # fmt: skip
    for name, codec in PEERS.items():
        bits = codec.bits_per_value(128)
        assert bits == pytest.approx(expected.get(name, bits)), name
        for which in ("k", "v"):
            kept = 1 - ((codec(x, 0, which) - x).square().sum() / x.square().sum()).item()
            assert kept > (0.8 if bits < 3.2 else 0.98), (name, which)


def test_k_and_v_may_differ():
    x = normal(1, 16, 32)
    codec = Codec(Side(Linear(8, 0), offset=0), Side(Linear(2, 0), offset=0))
    assert loss(lambda y: codec(y, 0, "k"), x) < 1e-3 < 1e-2 < loss(lambda y: codec(y, 0, "v"), x)
