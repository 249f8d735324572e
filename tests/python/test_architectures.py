"""Every architecture under every operation, against DynamicCache; docs/compatibility.md is made from these tests' ids.

Int4Cache runs with recipe "passthrough", which stores K and V without loss: the same tokens and logits must come out,
so that whatever differs is a mistake in bookkeeping. What the codes add is bounded by the tests of packed recipes.
"""

import copy
import dataclasses
import functools
import importlib.util
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    DynamicCache,
    EncoderDecoderCache,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
)
from transformers.cache_utils import DummyLayer  # noqa: E402
from transformers.generation.streamers import BaseStreamer  # noqa: E402

from architectures import ARCHITECTURES, WHISPER, WINDOW, built  # noqa: E402
from halfbyte import Int4Cache  # noqa: E402
from halfbyte.layer import Int4Layer  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]

STATEFUL = "not supported with stateful models"
NOT_CROPPABLE = "is not croppable"  # recurrent states can not go back

# (operation, architecture): how the library refuses it, whichever cache it is given.
LIBRARY_LACKS = {
    ("assisted_decoding", "qwen3-next"): STATEFUL,
    ("assisted_decoding", "falcon-h1"): STATEFUL,
    ("prompt_lookup", "qwen3-next"): STATEFUL,
    ("prompt_lookup", "falcon-h1"): STATEFUL,
    ("inputs_embeds", "falcon-h1"): "doesn't have its forwarding implemented",
    ("guidance", "t5"): "exactly one of input_ids or inputs_embeds",
    ("guidance", "t5-cross"): "exactly one of input_ids or inputs_embeds",
    ("crop", "qwen3-next"): NOT_CROPPABLE,
    ("crop", "falcon-h1"): NOT_CROPPABLE,
    ("crop_of_everything", "qwen3-next"): NOT_CROPPABLE,
    ("crop_of_everything", "falcon-h1"): NOT_CROPPABLE,
    ("repeat_and_select", "lfm2"): "no attribute 'batch_repeat_interleave'",
    ("repeat_and_select", "qwen3-next"): "no attribute 'batch_repeat_interleave'",
    ("repeat_and_select", "falcon-h1"): "Sizes of tensors must match",
}

# (operation, architecture): how Int4Cache refuses it.
REFUSES = {
    ("consistent", "bloom"): "takes a model with set_attn_implementation",
    ("consistent", "deepseek-v3"): "layer 0: the model uses K and V other than by attention",
    ("consistent", "t5"): "layer 0 takes causal attention",
    ("consistent", "t5-cross"): "layer 0 takes causal attention",
    ("consistent", "bart-cross"): "layer 0 takes causal attention",
}

architectures = pytest.mark.parametrize("name", ARCHITECTURES)


class Subject:
    """One architecture with one cache: DynamicCache under the library's attention, or Int4Cache of a recipe."""

    def __init__(self, name, recipe=None, attention=None, **overrides):
        self.name, self.recipe, self.overrides = name, recipe, overrides
        self.architecture = ARCHITECTURES[name]
        self.model = built(name)
        self.seq2seq = self.model.config.is_encoder_decoder
        own = self.architecture.reference if recipe is None else self.architecture.attention
        self.model.set_attn_implementation(attention or own)
        self.cache = self.new_cache()
        torch.manual_seed(11)

    def new_cache(self):
        return self.architecture.cache(self.model, self.recipe, **self.overrides)

    def inputs(self, ids, mask=None):
        """The model's arguments for ids [batch, tokens], of a decoder's text in an encoder-decoder."""
        if not self.seq2seq:
            return {"input_ids": ids} | ({} if mask is None else {"attention_mask": mask})
        source = tokens(40, seed=5).expand(ids.shape[0], -1)
        inputs = {"input_ids": source, "decoder_input_ids": ids}
        return inputs | ({} if mask is None else {"decoder_attention_mask": mask})

    @torch.no_grad()
    def forward(self, ids, mask=None, cache=None, **options):
        """Logits [batch, tokens, vocabulary]."""
        return self.model(**self.inputs(ids, mask), past_key_values=cache or self.cache, **options).logits

    def generate(self, ids, mask=None, cache=None, new=16, **options):
        """(sequences [batch, tokens], logits [batch, new, vocabulary])."""
        out = self.model.generate(
            **{
                **self.inputs(ids, mask),
                "past_key_values": cache or self.cache,
                "max_new_tokens": new,
                **DECODE,
                **options,
            }
        )
        return out.sequences, torch.stack(out.logits, dim=1)


DECODE = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
SAMPLE = {"do_sample": True, "top_k": 0, "temperature": 0.8}


def tokens(count, seed=0, batch=1):
    """Token ids [batch, count]; the first is the one that encoder-decoders start with."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 128, (batch, count), generator=generator)
    ids[:, 0] = 1
    return ids


def check(operation, name, operate):
    """Asserts that operate(subject) gives with a lossless Int4Cache what it gives with DynamicCache, be it an error."""
    cell = operation, name
    for recipe in ("passthrough", None):
        text = LIBRARY_LACKS.get(cell) or (recipe and REFUSES.get(cell))
        if text:
            with pytest.raises(Exception, match=text):
                operate(Subject(name, recipe))
    if cell not in LIBRARY_LACKS and cell not in REFUSES:
        same(operate(Subject(name, "passthrough")), operate(Subject(name)))


def same(got, wanted):
    if isinstance(wanted, (list, tuple)):
        assert len(got) == len(wanted)
        for pair in zip(got, wanted, strict=True):
            same(*pair)
    elif isinstance(wanted, torch.Tensor) and wanted.is_floating_point():
        torch.testing.assert_close(got, wanted, rtol=0, atol=5e-4)
    elif isinstance(wanted, torch.Tensor):
        assert torch.equal(got, wanted)
    else:
        assert got == wanted


@architectures
def test_greedy(name):
    """generate(do_sample=False), across the end of a block and of a page."""
    check("greedy", name, lambda subject: subject.generate(tokens(58), new=24))


@architectures
def test_sampling(name):
    """generate(do_sample=True) with a fixed seed."""
    check("sampling", name, lambda subject: subject.generate(tokens(58), **SAMPLE))


@architectures
def test_beam_search(name):
    """num_beams=3."""
    check("beam_search", name, lambda subject: subject.generate(tokens(58), num_beams=3, length_penalty=0.5))


@architectures
def test_beam_sampling(name):
    """num_beams=2 with do_sample, two prompts, a fixed seed."""
    check("beam_sampling", name, lambda subject: subject.generate(tokens(58, batch=2), new=12, num_beams=2, **SAMPLE))


@architectures
def test_return_sequences(name):
    """num_return_sequences=3 with sampling, two prompts."""

    def operate(subject):
        return subject.generate(tokens(58, batch=2), new=12, num_return_sequences=3, **SAMPLE)

    check("return_sequences", name, operate)


def assistant_of(subject):
    """A model that often, not always, guesses the subject's next token: its weights with noise on them."""
    model = copy.deepcopy(subject.model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * weight.std() * torch.randn(weight.shape, generator=generator) if weight.dim() > 1 else 0
    model.set_attn_implementation(subject.architecture.reference)
    model.generation_config.update(
        num_assistant_tokens=4, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    return model


def counting_crops(cache):
    """The cache's crop() counts, as a list that fills while it is used."""
    counts, crop = [], cache.crop

    def counted(tokens_to_remove):
        counts.append(int(tokens_to_remove))
        crop(tokens_to_remove)

    cache.crop = counted
    return counts


@architectures
def test_assisted_decoding(name):
    """assistant_model= with a model that is right now and then."""

    def operate(subject):
        counts = counting_crops(subject.cache)
        out = subject.generate(tokens(58), new=24, assistant_model=assistant_of(subject))
        assert len(counts) < 24, "no draft was accepted"
        assert any(counts), "every draft was accepted"
        return out

    check("assisted_decoding", name, operate)


@architectures
def test_prompt_lookup(name):
    """prompt_lookup_num_tokens=4 on a prompt that repeats itself."""

    def operate(subject):
        counts = counting_crops(subject.cache)
        out = subject.generate(torch.cat([tokens(30), tokens(29)], dim=1), prompt_lookup_num_tokens=4)
        assert any(counts), "every draft was accepted"
        return out

    check("prompt_lookup", name, operate)


LENGTHS = (70, 41, 9)


def padded(side):
    """Three texts of LENGTHS as ids and mask [3, 70]."""
    ids, mask = torch.zeros(3, 70, dtype=torch.long), torch.zeros(3, 70, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        span = slice(70 - length, 70) if side == "left" else slice(length)
        ids[row, span], mask[row, span] = tokens(length, seed=row)[0], 1
    return ids, mask


@architectures
def test_left_padding(name):
    """Three prompts of different lengths, padded on the left."""
    check("left_padding", name, lambda subject: subject.generate(*padded("left")))


@architectures
def test_right_padding(name):
    """A forward pass over prompts padded on the right, then steps that hide the padding."""

    def operate(subject):
        ids, mask = padded("right")
        logits = [subject.forward(ids, mask)[mask.bool()]]
        following = tokens(12, seed=3, batch=3)
        for step in range(12):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
            positions = torch.tensor(LENGTHS)[:, None] + step
            options = {} if subject.seq2seq else {"position_ids": positions}
            logits.append(subject.forward(following[:, step, None], mask, **options))
        return logits

    check("right_padding", name, operate)


@architectures
def test_chunked_prefill(name):
    """prefill_chunk_size=20."""
    check("chunked_prefill", name, lambda subject: subject.generate(tokens(75), prefill_chunk_size=20))


@architectures
def test_conversation(name):
    """Three turns in the same cache."""

    def operate(subject):
        ids, logits = tokens(20), []
        for turn in range(3):
            ids, of_turn = subject.generate(ids, new=10)
            logits.append(of_turn)
            ids = torch.cat([ids, tokens(13, seed=turn + 1)], dim=1)
        return ids, logits

    check("conversation", name, operate)


@architectures
def test_inputs_embeds(name):
    """inputs_embeds= in place of ids; decoder_inputs_embeds= in a forward pass of encoder-decoders."""

    def operate(subject):
        key = "decoder_inputs_embeds" if subject.seq2seq else "inputs_embeds"
        ids = tokens(58)
        embeds = subject.model.get_input_embeddings()(ids)
        inputs = {**subject.inputs(ids), key: embeds}
        del inputs["decoder_input_ids" if subject.seq2seq else "input_ids"]
        with torch.no_grad():
            first = subject.model(**inputs, past_key_values=subject.cache).logits
        if subject.seq2seq:
            return first
        out = subject.model.generate(
            inputs_embeds=embeds, past_key_values=subject.new_cache(), max_new_tokens=12, **DECODE
        )
        return first, out.sequences, torch.stack(out.logits, dim=1)

    check("inputs_embeds", name, operate)


@architectures
def test_guidance(name):
    """guidance_scale=1.5 with a negative prompt."""

    def operate(subject):
        return subject.generate(tokens(58), guidance_scale=1.5, negative_prompt_ids=tokens(21, seed=9))

    check("guidance", name, operate)


class Collected(BaseStreamer):
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.flatten())

    def end(self):
        self.ended = True


class UpTo(StoppingCriteria):
    """Stops at a length."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


LETTERS = "abcdef" + "".join(chr(0x4E00 + number) for number in range(122))  # StopStringCriteria encodes "abcdef"


def tokenizer():
    """One letter for each of 128 ids."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    letters = Tokenizer(models.WordLevel({letter: token for token, letter in enumerate(LETTERS)}, unk_token="a"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    letters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=letters)


@architectures
def test_stopping_and_streaming(name):
    """A stopping criterion, a streamer, and stop_strings."""

    def operate(subject):
        streamer = Collected()
        ids, _ = subject.generate(tokens(58), new=30, stopping_criteria=[UpTo(70)], streamer=streamer)
        assert streamer.ended
        assert torch.equal(torch.cat(streamer.pieces), ids[0])
        assert ids.shape[1] == 70
        stop = "".join(LETTERS[token] for token in ids[0, 62:64].tolist())
        stopped, _ = subject.generate(
            tokens(58), cache=subject.new_cache(), new=30, stop_strings=[stop], tokenizer=tokenizer()
        )
        assert stopped.shape[1] <= 64
        return ids, stopped, subject.cache.get_seq_length()

    check("stopping_and_streaming", name, operate)


@architectures
def test_crop(name):
    """crop() by negative counts, a tensor and zero, each followed by more tokens."""

    def operate(subject):
        cache = subject.cache
        cache.activate_past_recording()
        logits = [subject.forward(tokens(70))]
        for begin, remove in ((0, -3), (9, torch.tensor(-5)), (18, 0), (27, -9), (36, -1)):
            logits.append(subject.forward(tokens(50, seed=1)[:, begin : begin + 9]))
            cache.crop(remove)
            logits.append(subject.forward(tokens(1, seed=begin)))
            cache.crop(0)
        assert cache.is_croppable, NOT_CROPPABLE
        return int(cache.get_seq_length()), logits

    check("crop", name, operate)


@architectures
def test_crop_of_everything(name):
    """crop() by more than there is: an empty cache, which can be filled again."""

    def operate(subject):
        cache = subject.cache
        subject.forward(tokens(WINDOW - 4))
        cache.activate_past_recording()
        cache.crop(-100)
        assert cache.is_croppable, NOT_CROPPABLE
        assert cache.get_seq_length() == 0
        again = subject.forward(tokens(70, seed=1)), subject.forward(tokens(3))
        same(again[0], subject.forward(tokens(70, seed=1), cache=subject.new_cache()))
        return again

    check("crop_of_everything", name, operate)


@architectures
def test_reorder(name):
    """reorder_cache() between steps of one and of several tokens."""

    def operate(subject):
        logits = [subject.forward(tokens(58, batch=3))]
        for step, rows in enumerate(([2, 0, 1], [1, 1, 0], [0, 0, 0])):
            subject.cache.reorder_cache(torch.tensor(rows))
            logits += [subject.forward(tokens(count, seed=step, batch=3)) for count in (1, 5, 1)]
        return logits

    check("reorder", name, operate)


@architectures
def test_repeat_and_select(name):
    """batch_repeat_interleave() and batch_select_indices(), by index and by mask."""

    def operate(subject):
        cache, logits = subject.cache, [subject.forward(tokens(58, batch=2))]
        for rows, change in (
            (6, lambda: cache.batch_repeat_interleave(3)),
            (3, lambda: cache.batch_select_indices(torch.tensor([4, 0, 1]))),
            (2, lambda: cache.batch_select_indices(torch.tensor([True, False, True]))),
        ):
            change()
            logits += [subject.forward(tokens(count, seed=rows, batch=rows)) for count in (1, 5, 1)]
        return logits

    check("repeat_and_select", name, operate)


@architectures
def test_reset(name):
    """reset() after one answer, then another prompt in the same cache."""

    def operate(subject):
        subject.generate(tokens(70), new=4)
        subject.cache.reset()
        return subject.cache.get_seq_length(), subject.generate(tokens(50, seed=1))

    check("reset", name, operate)


@architectures
def test_prefix_reuse(name):
    """Two answers from deep copies of one prefilled cache, then one from the cache itself."""

    def operate(subject):
        prefix = tokens(70)
        subject.forward(prefix)
        answers = []
        for turn in range(2):
            ids = torch.cat([prefix, tokens(9, seed=turn + 1)], dim=1)
            answers.append(subject.generate(ids, cache=copy.deepcopy(subject.cache), new=12))
        return answers, subject.generate(torch.cat([prefix, tokens(9, seed=1)], dim=1), new=12)

    check("prefix_reuse", name, operate)


def stored(cache, path):
    """The cache after save() and load(); DynamicCache, which can not, as it is."""
    if isinstance(cache, EncoderDecoderCache):
        halves = cache.self_attention_cache, cache.cross_attention_cache
        return EncoderDecoderCache(*(stored(half, path) for half in halves))
    if not isinstance(cache, Int4Cache):
        return cache
    cache.save(path)
    return Int4Cache.load(path, cache._shared.config)


@architectures
def test_save_and_load(name, tmp_path):
    """A cache saved after a prefill and some steps, loaded, and continued."""

    def operate(subject):
        subject.forward(tokens(70))
        subject.forward(tokens(3, seed=1))
        subject.cache = stored(subject.cache, tmp_path / "cache.safetensors")
        return [subject.forward(tokens(count, seed=2)) for count in (9, 1, 1)]

    check("save_and_load", name, operate)


@architectures
def test_unpacked(name):
    """Under the library's own attention, which gets K and V unpacked."""
    got = Subject(name, "passthrough", attention=ARCHITECTURES[name].reference).generate(tokens(58), new=24)
    same(got, Subject(name).generate(tokens(58), new=24))


@functools.cache
def forced(name, recipe=None, prompt=0, **options):
    """Logits [2, n, vocabulary] of given tokens through most of what a cache does, after the prefill of a prompt."""
    subject = Subject(name, recipe, **options)
    cache, text = subject.cache, tokens(90, seed=2, batch=2)
    subject.forward(tokens(41, seed=prompt, batch=2))
    logits = [subject.forward(text[:, step, None]) for step in range(26)]  # across the end of a page
    if ("crop", name) not in LIBRARY_LACKS:
        cache.activate_past_recording()
        logits.append(subject.forward(text[:, 30:39]))
        cache.crop(-4)
    cache.reorder_cache(torch.tensor([1, 0]))
    if ("repeat_and_select", name) not in LIBRARY_LACKS:
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
    logits += [subject.forward(text[:, step, None]) for step in range(40, 60)]
    return torch.cat(logits, dim=1)


def divergences(logits, wanted):
    """KL in nats from the wanted distributions to the ones got, token by token."""
    p, q = wanted.log_softmax(-1), logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).flatten()


@architectures
def test_four_bits(name):
    """The default recipe costs less than a quarter of what forgetting the prompt does, in KL on random weights."""
    wanted = forced(name)
    got = divergences(forced(name, "default"), wanted).mean()
    assert got < divergences(forced(name, prompt=1), wanted).mean() / 4
    assert (got == 0) == ("p" not in ARCHITECTURES[name].layers)


@architectures
def test_eight_bits(name):
    """Eight bits are nearer than four by what the finer codes explain: a misplaced token would be as wrong in both."""
    wanted = forced(name)
    four = divergences(forced(name, "default"), wanted).median()
    eight = divergences(forced(name, "default", k_bits=8, v_bits=8, v_group=32), wanted).median()
    assert eight <= four / 40


def of_split(subject, *lengths):
    """Logits of one text in steps of the given lengths."""
    return torch.cat([subject.forward(piece) for piece in tokens(sum(lengths)).split(lengths, dim=1)], dim=1)


@architectures
def test_consistent(name):
    """prefill="consistent" in four bits: the logits of a text do not depend on how it is split into steps."""
    refusal = REFUSES.get(("consistent", name))
    if refusal:
        with pytest.raises((NotImplementedError, ValueError), match=refusal):
            of_split(Subject(name, "default", prefill="consistent"), 80)
        return
    whole, split = (of_split(Subject(name, "default", prefill="consistent"), *by) for by in ((80,), (33, 38, *[1] * 9)))
    if "p" in ARCHITECTURES[name].layers:
        same(split, whole)
    else:
        same(split, of_split(Subject(name), 33, 38, *[1] * 9))


@architectures
def test_layers(name, monkeypatch):
    """Which layers are packed, the library's own, or without a cache; and whether steps attend on the codes."""
    subject, unpacked, unpack = Subject(name, "default"), [], Int4Layer._unpack
    subject.forward(tokens(40))
    monkeypatch.setattr(Int4Layer, "_unpack", lambda self, count: unpacked.append(self) or unpack(self, count))
    subject.forward(tokens(1))
    subject.forward(tokens(3))
    assert bool(unpacked) == subject.architecture.unpacks
    caches = [subject.cache]
    if subject.seq2seq:
        caches = [subject.cache.self_attention_cache]
        if subject.architecture.cross:
            caches.append(subject.cache.cross_attention_cache)
    for cache in caches:
        kinds = {Int4Layer: "p", DummyLayer: "-"}
        assert "".join(kinds.get(type(layer), "l") for layer in cache.layers) == subject.architecture.layers
        assert all(layer.native.packed_tokens for layer in cache.layers if type(layer) is Int4Layer)


MOVED = {
    "group-beam-search": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "contrastive-search": {"penalty_alpha": 0.6, "top_k": 4},
    "DoLa": {"dola_layers": "low"},
    "constrained-beam-search": {"num_beams": 2, "force_words_ids": [[5]]},
}


@pytest.mark.parametrize("mode", MOVED)
def test_moved_to_the_hub(mode):
    """Ways of decoding that the library no longer holds: it wants code from the hub, whichever cache it is given."""
    for recipe in ("passthrough", None):
        with pytest.raises(ValueError, match="trust_remote_code"):
            Subject("llama", recipe).generate(tokens(10), **MOVED[mode])


def of(name, **options):
    """The model of an architecture with some of its options changed."""
    return dataclasses.replace(ARCHITECTURES[name], options={**ARCHITECTURES[name].options, **options}).build()


def odd_heads():
    config = GPT2Config(vocab_size=128, n_embd=60, n_layer=2, n_head=4, pad_token_id=0, eos_token_id=None)
    return GPT2LMHeadModel(config).eval()


REFUSED = {
    "head-size-8": (lambda: of("llama", head_dim=8), ValueError, "layer 0: head_dim is 8"),
    "head-size-514": (lambda: of("llama", head_dim=514), ValueError, "layer 0: head_dim is 514"),
    "odd-head-size": (odd_heads, ValueError, "layer 0: head_dim is 15"),
    "head-size-of-V": (lambda: of("mimo-v2", v_head_dim=8), ValueError, "layer 0: head_dim is 8"),
    "head-size-of-one-layer": (lambda: of("gemma4", global_head_dim=8), ValueError, "layer 1: head_dim is 8"),
    "indexed-attention": (
        lambda: of("deepseek-v32"),
        NotImplementedError,
        "layer 0: indices: .* can not do the attention of DeepseekV32Attention",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what):
    """Models that the cache can not serve: an error that names the layer, before a token is generated."""
    build, error, text = REFUSED[what]
    model, streamer = build(), Collected()
    model.set_attn_implementation("halfbyte")
    ids = tokens(20)
    with pytest.raises(error, match=text):
        model.generate(ids, past_key_values=Int4Cache(model.config), max_new_tokens=4, streamer=streamer)
    assert torch.equal(torch.cat(streamer.pieces), ids[0])
    model.set_attn_implementation("eager")
    model.generate(ids, past_key_values=DynamicCache(config=model.config), max_new_tokens=1)


def test_refused_layer_type():
    """A type of layer that the library does not know either, named with its index when the cache is made."""
    config = copy.deepcopy(built("llama").config)
    config.layer_types = ["full_attention", "heavily_compressed_attention"]
    with pytest.raises(ValueError, match="layer 1 is of type 'heavily_compressed_attention', takes one of"):
        Int4Cache(config)


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, SAMPLE], ids=["greedy", "beam_search", "sampling"])
def test_whisper(mode):
    """Whisper's own generate(), with cross-attention in DynamicCache and packed."""
    model, sound = WHISPER.build(), torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))

    def answer(architecture, recipe, attention):
        model.set_attn_implementation(attention)
        torch.manual_seed(11)
        cache = architecture.cache(model, recipe)
        ids = model.generate(sound, past_key_values=cache, max_new_tokens=70, **mode)
        assert cache.get_seq_length() == 70
        return ids

    wanted = answer(WHISPER, None, "sdpa")
    for cross in (False, True):
        same(answer(dataclasses.replace(WHISPER, cross=cross), "passthrough", "halfbyte"), wanted)


@pytest.mark.parametrize("model", ["llama", "gemma3"])
def test_beyond_the_library(model):
    """crop() to a length, the older form, and another batch in a cache that was emptied."""
    wanted = Subject(model).forward(torch.cat([tokens(61), tokens(5)], dim=1))[:, -5:]
    other = tokens(50, seed=1, batch=3)
    wanted_other = Subject(model).forward(other)
    subject = Subject(model, "passthrough")
    subject.cache.activate_past_recording()
    subject.forward(tokens(50))
    subject.forward(tokens(70)[:, 50:])
    subject.cache.crop(61)
    same(subject.forward(tokens(5)), wanted)
    for empty in (lambda: subject.cache.crop(-200), subject.cache.reset):
        empty()
        same(subject.forward(other), wanted_other)


def test_the_page_is_up_to_date(request):
    spec = importlib.util.spec_from_file_location("write_compatibility", ROOT / "tools" / "write_compatibility.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    names = [item.name for item in request.node.parent.collect()]  # all of them, whatever -k chose
    page = tool.PAGE.read_text()
    assert page == tool.up_to_date(page, names), "run python tools/write_compatibility.py"
