"""Calibration: lambda and offsets against their definitions, the file they are kept in, and sampled text."""

import json

import pytest
import torch
from safetensors.torch import save_file

from halfbyte import Int4Cache
from halfbyte.calibrate import Calibration, calibrate, fingerprint, sample_text
from halfbyte.codecs import rotate
from halfbyte.recipes import get_recipe
from halfbyte.rope import layer_rope
from halfbyte.watch import watch_attention

FIRST_PARTS = ("lambda_k", "lambda_v", "offset_k", "offset_v")


@pytest.fixture(scope="module")
def calibration(qwen, text):
    return calibrate(qwen, text[0, :256], window=128, progress=False, offsets=True)


def states(model, ids, window):
    """Per layer the keys and values of a plain cache: {"k", "v": [windows, kv_heads, tokens, head_dim]}."""
    from transformers import DynamicCache

    model.set_attn_implementation("sdpa")
    caches = []
    for start in range(0, ids.numel(), window):
        caches.append(DynamicCache(config=model.config))
        with torch.inference_mode():
            model(ids[None, start : start + window], past_key_values=caches[-1], use_cache=True)
    layers = range(len(caches[0].layers))
    return [
        {
            which: torch.stack([getattr(cache.layers[i], name)[0] for cache in caches])
            for which, name in (("k", "keys"), ("v", "values"))
        }
        for i in layers
    ]


@pytest.mark.parametrize("name", ["paper-g32-lambda", "fixed-offset", "default"])
def test_lambda_and_offset_follow_their_definitions(qwen, text, name):
    recipe, span = get_recipe(name), get_recipe(name).offset_span
    found = calibrate(qwen, text[0, :300], window=150, progress=False, recipe=recipe, offsets=True)
    assert found.turns == (span > 0)
    rope = layer_rope(qwen.config, 0, "full_attention", 128)
    for layer, seen in enumerate(states(qwen, text[0, :300], 150)):
        for which, x in seen.items():
            mean = x.mean((0, 2))
            offset = mean[None, :, None].expand_as(x)
            if span and which == "k":
                middle = torch.arange(150) // span * span + (span - 1) // 2
                mean = rope.turn(x, -middle).mean((0, 2))
                offset = rope.turn(mean[None, :, None].expand_as(x), middle)
            centred = x - offset if recipe.offset else x
            expected = 1 / rotate(centred, recipe, layer).abs().amax((0, 2)).clamp_min(1e-6)
            torch.testing.assert_close(getattr(found, f"offset_{which}")[layer], mean, rtol=1e-4, atol=2e-4)
            torch.testing.assert_close(getattr(found, f"lambda_{which}")[layer], expected, rtol=1e-3, atol=0)


def test_offsets_are_given_when_asked_for(qwen, text, tmp_path):
    found = calibrate(qwen, text[0, :256], window=128, progress=False)
    assert (found.offset_k, found.offset_v) == ([], [])
    found.save(tmp_path / "calibration.safetensors")
    back = Calibration.load(tmp_path / "calibration.safetensors", qwen)
    assert (back.offset_k, len(back.lambda_k), back.turns) == ([], 4, True)


def test_a_file_of_version_1_has_offsets_that_do_not_turn(qwen, text, tmp_path):
    """Written as before offsets turned: no word of their span."""
    found = calibrate(qwen, text[0, :256], progress=False, recipe="fixed-offset", offsets=True)
    tensors = {f"layers.{i}.{part}": getattr(found, part)[i] for i in range(4) for part in FIRST_PARTS}
    facts = {"recipe": {"rotation": "srft", "seed": 0, "offset": True}, "model": fingerprint(qwen)}
    facts |= {"text_sha256": "", "tokens": 256, "seed": None, "learned": {}}
    path = tmp_path / "calibration.safetensors"
    save_file(tensors, path, {"format": "halfbyte-calibration", "version": "1", "facts": json.dumps(facts)})
    back = Calibration.load(path, qwen)
    assert not back.turns
    back.check_recipe(get_recipe("fixed-offset"))
    with pytest.raises(ValueError, match="made with offset_span=0, the recipe has 64"):
        back.check_recipe(get_recipe("default"))
    assert all(map(torch.equal, back.offset_k, found.offset_k))


def test_rotation_keeps_lengths_and_its_inverse_undoes_it():
    x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(0))
    y = rotate(x, get_recipe("default"), 2)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotate(y, get_recipe("default"), 2, inverse=True), x, rtol=1e-5, atol=1e-5)
    assert (y - x).abs().max() > 0.1


def test_a_saved_calibration_comes_back_whole(calibration, qwen, tmp_path):
    path = tmp_path / "calibration.safetensors"
    calibration.save(path)
    back = Calibration.load(path, qwen)
    for part in ("lambda_k", "lambda_v", "offset_k", "offset_v"):
        assert len(getattr(back, part)) == 4
        for x, y in zip(getattr(back, part), getattr(calibration, part), strict=True):
            assert torch.equal(x, y)
    assert (back.recipe, back.model, back.text_sha256, back.tokens) == (
        calibration.recipe,
        calibration.model,
        calibration.text_sha256,
        256,
    )


def test_dense_rotations_are_part_of_a_saved_calibration(calibration, qwen, tmp_path):
    from dataclasses import replace

    path = tmp_path / "calibration.safetensors"
    rotations = [torch.linalg.qr(torch.randn(128, 128))[0] for _ in range(4)]
    replace(calibration, rotation_k=rotations, rotation_v=rotations[::-1]).save(path)
    back = Calibration.load(path, qwen)
    assert all(torch.equal(a, b) for a, b in zip(back.rotation_k, rotations, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(back.rotation_v, rotations[::-1], strict=True))
    assert len(back.lambda_k) == 4


def test_files_that_are_no_calibration_are_refused(calibration, gemma, tmp_path):
    path = tmp_path / "calibration.safetensors"
    with pytest.raises(ValueError, match="no calibration file"):
        Calibration.load(path)
    with pytest.raises(ValueError, match="path: cannot write"):
        calibration.save(tmp_path / "missing" / "calibration.safetensors")
    calibration.save(path)
    with pytest.raises(ValueError, match="another model"):
        Calibration.load(path, gemma)
    whole = path.read_bytes()
    for length in (0, 7, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            Calibration.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a halfbyte-calibration one"):
        Calibration.load(path)
    save_file({"x": torch.zeros(1)}, path, {"format": "halfbyte-calibration", "version": "9"})
    with pytest.raises(ValueError, match="format version '9'; takes '1', '2'"):
        Calibration.load(path)
    save_file({"x": torch.zeros(1)}, path, {"format": "halfbyte-calibration", "version": "1"})
    with pytest.raises(ValueError, match="halfbyte-calibration file is damaged"):
        Calibration.load(path)


def test_a_calibration_for_another_rotation_is_refused(calibration):
    calibration.check_recipe(get_recipe("paper-g32-lambda"))
    with pytest.raises(ValueError, match="made with offset=False, the recipe has True"):
        calibration.check_recipe(get_recipe("default"))


def test_a_cache_refuses_what_is_no_calibration_or_of_another_rotation(qwen, calibration):
    Int4Cache(qwen.config, "paper-g32-lambda", calibration)
    with pytest.raises(ValueError, match="made with rotation='srft', the recipe has 'srht'"):
        Int4Cache(qwen.config, "paper-g32-lambda", calibration, rotation="srht")
    with pytest.raises(ValueError, match=r"calibration: got a str, takes .*Calibration.load\(path\)"):
        Int4Cache(qwen.config, "paper-g32-lambda", "calibration.safetensors")


def test_the_fingerprint_is_of_the_weights_and_not_of_their_dtype(qwen, gemma):
    from conftest import load

    assert fingerprint(load("tiny-qwen", "bfloat16")) == fingerprint(qwen) != fingerprint(gemma)


def test_watching_ends_with_its_block_even_on_an_error(qwen, text):
    qwen.set_attn_implementation("sdpa")

    def failing(layer, query, key, value):
        raise KeyError("seen")

    with pytest.raises(KeyError), watch_attention(qwen, failing):
        qwen(text[:, :8], use_cache=False)
    assert qwen.config._attn_implementation == "sdpa"
    with watch_attention(qwen, lambda layer, query, key, value: (key, value)):
        with pytest.raises(RuntimeError, match="another one is active"), watch_attention(qwen, failing):
            pass
        qwen(text[:, :8], use_cache=False)


def test_sampled_text_depends_on_the_seed_alone(qwen):
    first = sample_text(qwen, 100, seed=3, progress=False)
    assert first.shape == (100,)
    assert torch.equal(first, sample_text(qwen, 100, seed=3, progress=False))
    assert not torch.equal(first, sample_text(qwen, 100, seed=4, progress=False))
    with pytest.raises(ValueError, match="tokens: got 0"):
        sample_text(qwen, 0)


def test_too_short_a_text_is_refused(qwen):
    with pytest.raises(ValueError, match="got 5 tokens"):
        calibrate(qwen, torch.arange(5), progress=False)
