"""prefill="consistent": what is stored and computed for a token depends on the tokens before it alone.

A model's own matrix products round differently for one row than for many, which now and then moves a code by one. Where
bits are compared, every row of every linear layer is therefore multiplied on its own.
"""

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from halfbyte import Int4Cache  # noqa: E402

LENGTH = 230
SPLITS = {
    "one": [LENGTH],
    "chunks": [20, 37, 1, 1, 100, 71],
    "pages": [64, 64, 64, 38],
    "blocks": [16] * 14 + [6],
    "short first": [3, 9, 218],
}


@torch.no_grad()
def feed(model, ids, splits, **options):
    """(logits of every token, the cache)."""
    model.set_attn_implementation("halfbyte")
    mask = options.pop("attention_mask", None)
    cache, logits, at = Int4Cache(model.config, prefill="consistent", **options), [], 0
    for tokens in splits:
        more = {} if mask is None else {"attention_mask": mask[:, : at + tokens]}
        logits.append(model(ids[:, at : at + tokens], past_key_values=cache, **more).logits)
        at += tokens
    assert at == ids.shape[1]
    return torch.cat(logits, dim=1), cache


def assert_same_bytes(cache, other):
    for layer, twin in zip(cache.layers, other.layers, strict=True):
        ours, theirs = layer.native.save(), twin.native.save()
        for name in ("length", "packed_end", "offset_ready"):
            assert ours[name] == theirs[name]
        for name in ("raw_k", "raw_v", "offset_k", "offset_v"):
            assert (ours[name] == theirs[name]).all()
        if not layer.is_sliding:  # those hold what they hold since the last step
            assert (ours["pages"] == theirs["pages"]).all()
        assert torch.equal(*(each.keys[:, :, -20:] for each in (layer, twin)))
        assert torch.equal(*(each.values[:, :, -20:] for each in (layer, twin)))


@pytest.mark.parametrize("splits", SPLITS.values(), ids=SPLITS)
def test_any_split_gives_the_bits_of_single_tokens(model, text, row_by_row, splits):
    ids = text[:, :LENGTH]
    wanted, single = feed(model, ids, [1] * LENGTH)
    logits, cache = feed(model, ids, splits)
    assert torch.equal(logits, wanted)
    assert_same_bytes(cache, single)


@pytest.mark.parametrize("options", [{"sink_tokens": 16}, {"raw_window": 32}, {"offset": False}, {"v_group": 32}])
def test_other_recipes(model, text, row_by_row, options):
    ids = text[:, :150]
    wanted, single = feed(model, ids, [1] * 150, **options)
    logits, cache = feed(model, ids, [40, 1, 61, 48], **options)
    assert torch.equal(logits, wanted)
    assert_same_bytes(cache, single)


def test_padding_is_left_out_of_the_offset_however_it_arrives(model, text, row_by_row):
    ids, mask = text[:, :120].repeat(2, 1), torch.ones(2, 120, dtype=torch.long)
    mask[1, :37] = 0
    wanted, single = feed(model, ids, [1] * 120, attention_mask=mask)
    logits, cache = feed(model, ids, [50, 3, 67], attention_mask=mask)
    assert torch.equal(logits[0], wanted[0])
    assert torch.equal(logits[1, 37:], wanted[1, 37:])  # what padding itself sees is nobody's business
    for layer, twin in zip(cache.layers, single.layers, strict=True):
        assert (layer.native.save()["offset_k"] == twin.native.save()["offset_k"]).all()


@pytest.mark.parametrize("overshoot", [1, 5, 16, 40])
def test_rejected_tokens_leave_no_trace(model, text, row_by_row, overshoot):
    """As assisted decoding goes on: some tokens too many, a crop, on; also back across the offset's 64 tokens."""
    ids = text[:, :150]
    wanted, single = feed(model, ids, [1] * 150)
    model.set_attn_implementation("halfbyte")
    cache, logits, at = Int4Cache(model.config, prefill="consistent"), [], 0
    cache.activate_past_recording()
    with torch.no_grad():
        while at < 150:
            good = min(3 + at % 7, 150 - at)
            step = torch.cat([ids[:, at : at + good], ids[:, :overshoot].flip(1)], dim=1)
            logits.append(model(step, past_key_values=cache).logits[:, :good])
            cache.crop(-overshoot)
            at += good
    assert torch.equal(torch.cat(logits, dim=1), wanted)
    for layer, twin in zip(cache.layers, single.layers, strict=True):
        visible = twin.keys.shape[2]
        assert torch.equal(layer.keys[:, :, -visible:], twin.keys)
        assert torch.equal(layer.values[:, :, -visible:], twin.values)


def test_attention_agrees_with_attention_on_unpacked_values(model, text):
    ids = text[:, :LENGTH]
    _, cache = feed(model, ids, [LENGTH])
    dense = Int4Cache(model.config, offset_tokens=64)
    for layer, twin in zip(cache.layers, dense.layers, strict=True):
        twin.keys, twin.values = layer.keys, layer.values
    with torch.no_grad():
        packed = model(text[:, LENGTH : LENGTH + 1], past_key_values=cache).logits
    assert packed.isfinite().all()
    own, _ = feed(model, text[:, : LENGTH + 1], [LENGTH, 1])
    torch.testing.assert_close(packed, own[:, -1:], rtol=0, atol=1e-3)


@pytest.mark.slow
def test_assisted_decoding_and_prompt_lookup_give_the_greedy_tokens_of_200_prompts(model):
    """The model as it is; half of the prompts on each model, with an assistant that is often wrong."""
    model.set_attn_implementation("halfbyte")
    torch.manual_seed(11)
    assistant = copy.deepcopy(model)
    for weight in assistant.parameters():
        weight.data += 0.1 * weight.std() * torch.randn_like(weight)
    assistant.generation_config.num_assistant_tokens = 5
    accepted = []
    for prompt in range(100):
        ids = torch.randint(5, 4000, (1, int(torch.randint(8, 80, ()))))
        ids = torch.cat([ids, ids[:, :6]], dim=1)
        new = 10
        wanted = _generate(model, ids, new)
        options = {"prompt_lookup_num_tokens": 4} if prompt % 2 else {"assistant_model": assistant}
        calls = []
        hook = model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        assert torch.equal(_generate(model, ids, new, **options), wanted), f"prompt {prompt}"
        hook.remove()
        accepted.append(len(calls) < new)
    assert any(accepted[0::2])  # otherwise nothing was assisted


def _generate(model, ids, new, **options):
    cache = Int4Cache(model.config, prefill="consistent")
    return model.generate(ids, past_key_values=cache, max_new_tokens=new, do_sample=False, **options)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_attention_implementations_are_refused(qwen, text, attention):
    qwen.set_attn_implementation(attention)
    with pytest.raises(ValueError, match="consistent"):
        qwen(text[:, :20], past_key_values=Int4Cache(qwen.config, prefill="consistent"))


def test_unknown_prefill(qwen):
    with pytest.raises(ValueError, match="takes 'exact' or 'consistent'"):
        Int4Cache(qwen.config, prefill="fast")
