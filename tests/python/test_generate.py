"""generate() with an Int4Cache: the tokens and logits of DynamicCache, as near as the bits allow."""

import copy

import pytest

from conftest import load

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList  # noqa: E402

from halfbyte import Int4Cache  # noqa: E402

EIGHT = {"k_bits": 8, "v_bits": 8, "v_group": 32}


class Follow(LogitsProcessor):
    """Forces given tokens, so that the logits of two runs stay comparable step by step."""

    def __init__(self, tokens, start):
        self.tokens, self.start = tokens, start

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self.start
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter_(1, self.tokens[:, step, None], 0.0)


def run(model, ids, cache, attention, new=24, follow=None, **options):
    """(tokens [batch, new], logits [batch, new, vocabulary])."""
    model.set_attn_implementation(attention)
    if follow is not None:
        options["logits_processor"] = LogitsProcessorList([Follow(follow, ids.shape[1])])
    options = {"do_sample": False, **options}
    out = model.generate(
        ids,
        past_key_values=cache,
        max_new_tokens=new,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1)


def reference(model, ids, **options):
    return run(model, ids, DynamicCache(config=model.config), "sdpa", **options)


def divergence(logits, wanted):
    """Mean KL in nats from the wanted distributions to the ones got."""
    p, q = wanted.log_softmax(-1), logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("attention", ["halfbyte", "sdpa", "eager"])
def test_greedy_gives_the_tokens_of_dynamic_cache_at_8_bits(model, text, attention):
    ids = text[:, :300]
    tokens, logits = reference(model, ids)
    got, _ = run(model, ids, Int4Cache(model.config, **EIGHT), attention)
    assert torch.equal(got, tokens)
    _, near = run(model, ids, Int4Cache(model.config, **EIGHT), attention, follow=tokens)
    assert divergence(near, logits) < 1e-4


def test_default_recipe_stays_close(model, text):
    ids = text[:, :300]
    tokens, logits = reference(model, ids, new=48)
    _, near = run(model, ids, Int4Cache(model.config), "halfbyte", new=48, follow=tokens)
    assert divergence(near, logits) < 0.015
    assert (near.argmax(-1) == tokens).float().mean() > 0.9


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_attention_implementations_agree_with_packed_attention(model, text, attention):
    ids = text[:, :290]
    tokens, packed = run(model, ids, Int4Cache(model.config), "halfbyte", new=40)
    _, dense = run(model, ids, Int4Cache(model.config), attention, new=40, follow=tokens)
    assert divergence(dense, packed) < 1e-3


def test_the_first_prefill_is_exact(model, text):
    ids = text[:, :600]
    for attention in ("halfbyte", "sdpa"):
        _, logits = run(model, ids, Int4Cache(model.config), attention, new=1)
        torch.testing.assert_close(logits, reference(model, ids, new=1)[1], rtol=0, atol=1e-5)


def test_past_the_sliding_window(gemma, text):
    ids = text[:, :600]
    tokens, logits = reference(gemma, ids, new=40)
    got, _ = run(gemma, ids, Int4Cache(gemma.config, **EIGHT), "halfbyte", new=40)
    assert torch.equal(got, tokens)
    short = text[:, :230]  # grows across the window while decoding
    tokens, logits = reference(gemma, short, new=60)
    cache = Int4Cache(gemma.config, **EIGHT)
    _, near = run(gemma, short, cache, "halfbyte", new=60, follow=tokens)
    assert divergence(near, logits) < 1e-4
    assert cache.layers[0].native.visible < 256 + 64


@pytest.mark.parametrize("attention", ["halfbyte", "sdpa"])
def test_left_padding_equals_single_runs(model, text, attention):
    lengths, width = (290, 261, 40), 290
    ids = torch.zeros(3, width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = text[0, row : row + length]
        mask[row, width - length :] = 1
    tokens, logits = reference(model, ids, attention_mask=mask)
    batch_cache = Int4Cache(model.config, **EIGHT)
    _, together = run(model, ids, batch_cache, attention, attention_mask=mask, follow=tokens)
    for row, length in enumerate(lengths):
        single = ids[row : row + 1, width - length :]
        _, alone = run(model, single, Int4Cache(model.config, **EIGHT), attention, follow=tokens[row : row + 1])
        assert divergence(together[row], alone[0]) < 5e-4
        assert divergence(together[row], logits[row]) < 5e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["tiny-qwen", "tiny-gemma"])
def test_half_precision(name, dtype, text):
    model = load(name, dtype)
    tokens, logits = reference(model, text[:, :300])
    _, near = run(model, text[:, :300], Int4Cache(model.config, **EIGHT), "halfbyte", follow=tokens)
    assert divergence(near.float(), logits.float()) < 2e-3


def test_sampling_is_reproducible(model, text):
    def sample(cache, attention="halfbyte"):
        torch.manual_seed(3)
        return run(model, text[:, :100], cache, attention, do_sample=True, top_k=20)[0]

    packed = [sample(Int4Cache(model.config, **EIGHT)) for _ in range(2)]
    assert torch.equal(*packed)
    # Vectors kept as floats: a draw next to a boundary falls on either side of it with codes of 8 bits.
    plain = sample(Int4Cache(model.config, "passthrough"))
    assert torch.equal(plain, sample(DynamicCache(config=model.config), "sdpa"))


def test_a_conversation_goes_on_in_the_same_cache(model, text):
    exact, eight = Int4Cache(model.config, "passthrough"), Int4Cache(model.config, **EIGHT)
    whole, ids = DynamicCache(config=model.config), text[:, :120]
    for turn in range(3):
        tokens, logits = run(model, ids, whole, "sdpa", new=20)
        assert torch.equal(run(model, ids, exact, "halfbyte", new=20)[0], tokens)
        _, near = run(model, ids, eight, "halfbyte", new=20, follow=tokens)
        # 8-bit codes alone cost 0.036 and 0.022 (the two models); weights of one byte made it 0.064 and 0.056.
        assert (near - logits).abs().max() < 0.05
        assert exact.get_seq_length() == eight.get_seq_length() == ids.shape[1] + 19
        ids = torch.cat([ids, tokens, text[:, 200 + 60 * turn : 250 + 60 * turn]], dim=1)


def test_chunked_prefill(model, text):
    ids = text[:, :500]
    tokens, logits = reference(model, ids)
    _, near = run(model, ids, Int4Cache(model.config, **EIGHT), "halfbyte", follow=tokens, prefill_chunk_size=96)
    assert divergence(near, logits) < 5e-4


def test_beam_search(model, text):
    wanted = {}
    for name, cache in (("sdpa", DynamicCache(config=model.config)), ("halfbyte", Int4Cache(model.config, **EIGHT))):
        model.set_attn_implementation(name)
        wanted[name] = model.generate(
            text[:, :280], past_key_values=cache, max_new_tokens=16, num_beams=3, do_sample=False
        )
    assert torch.equal(wanted["halfbyte"], wanted["sdpa"])


def test_prompt_lookup_and_assisted_decoding_give_the_greedy_tokens(model, text):
    ids = torch.cat([text[:, :150], text[:, :140]], dim=1)  # repeats itself, so that candidates are found
    tokens, _ = run(model, ids, Int4Cache(model.config, **EIGHT), "halfbyte", new=32)
    for options in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": copy.deepcopy(model)}):
        cache = Int4Cache(model.config, **EIGHT)
        got = model.generate(ids, past_key_values=cache, max_new_tokens=32, do_sample=False, **options)
        assert torch.equal(got[:, ids.shape[1] :], tokens)


def test_one_token_prompt(model, text):
    tokens, logits = reference(model, text[:, :1], new=40)
    _, near = run(model, text[:, :1], Int4Cache(model.config, **EIGHT), "halfbyte", new=40, follow=tokens)
    assert divergence(near, logits) < 1e-3
