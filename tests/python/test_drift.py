"""The drift monitor: silent on a recipe that suits, loud on one that does not, and never in the way."""

import copy
import warnings

import pytest
import torch

from halfbyte import Int4Cache


def decode(cache, model, ids, prefix=64, chunk=16):
    model.set_attn_implementation("halfbyte")
    starts = [0, *range(prefix, ids.shape[1], chunk)]
    with torch.inference_mode():
        return torch.cat(
            [
                model(ids[:, start:end], past_key_values=cache, use_cache=True).logits
                for start, end in zip(starts, [*starts[1:], ids.shape[1]], strict=True)
            ],
            1,
        )


def test_a_good_recipe_stays_silent_and_the_output_is_the_same(model, text):
    ids = text[:, :400]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watched, plain = Int4Cache(model.config, drift_every=64), Int4Cache(model.config)
        assert torch.equal(decode(watched, model, ids), decode(plain, model, ids))
    assert plain.drift is None
    assert [tokens for tokens, _ in watched.drift.errors] == list(range(128, 400, 64))
    assert all(0 < error < 0.2 for _, error in watched.drift.errors)


def test_a_recipe_that_loses_much_warns_once(qwen, text):
    with pytest.warns(UserWarning, match=r"layer 3 after \d+ tokens: packed attention is .* away from raw") as caught:
        decode(Int4Cache(qwen.config, "paper-per-token", drift_every=64), qwen, text[:, :400])
    assert len(caught) == 1


def test_eight_bits_drift_less(qwen, text):
    few, many = Int4Cache(qwen.config, drift_every=128), Int4Cache(qwen.config, k_bits=8, v_bits=8, drift_every=128)
    for cache in (few, many):
        decode(cache, qwen, text[:, :320])
    assert many.drift.errors[-1][1] < 0.2 * few.drift.errors[-1][1]


def test_cropping_and_copying_start_over_or_apart(qwen, text):
    cache = Int4Cache(qwen.config, drift_every=64)
    decode(cache, qwen, text[:, :300])
    other = copy.deepcopy(cache)
    count = len(cache.drift.errors)
    cache.crop(-90)
    decode(cache, qwen, text[:, 210:300], prefix=16)
    assert len(cache.drift.errors) > count == len(other.drift.errors)
    assert all(error < 0.2 for _, error in cache.drift.errors)


def test_too_short_a_distance_is_refused(qwen):
    with pytest.raises(ValueError, match="drift_every: got 8; takes 0 or at least 32"):
        Int4Cache(qwen.config, drift_every=8)
