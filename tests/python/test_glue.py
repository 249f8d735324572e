"""The Python between model and extension: few calls a step, and nothing that is done token by token."""

import collections
import copy
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from halfbyte import Int4Cache, bench_glue, shared  # noqa: E402


class Recorder:
    """Stands in for something of the extension and notes the name of everything asked of it."""

    def __init__(self, inner, asked):
        self.inner, self.asked = inner, asked

    def __getattr__(self, name):
        self.asked.append(name)
        return getattr(self.inner, name)


@torch.no_grad()
def forward(model, ids, cache):
    model.set_attn_implementation("halfbyte")
    return model(ids, past_key_values=cache, logits_to_keep=1).logits


def filled(model, ids, **options):
    cache = Int4Cache(model.config, **options)
    forward(model, ids[:, :-1], cache)
    forward(model, ids[:, -1:], cache)
    return cache


@pytest.mark.parametrize("recipe", ["default", "passthrough"])
def test_a_decoding_step_makes_two_extension_calls_a_layer(model, text, monkeypatch, recipe):
    cache, module_asked = filled(model, text[:, :280], recipe=recipe), []
    monkeypatch.setattr(shared, "_native", Recorder(shared._native, module_asked))
    for token in range(280, 297):  # completes a block on the way, and gemma's window is full
        module_asked.clear()
        asked = [[] for _ in cache.layers]
        natives = [each.native for each in cache.layers]
        for each, names in zip(cache.layers, asked, strict=True):
            each.native = Recorder(each.native, names)
        logits = forward(model, text[:, token : token + 1], cache)
        for each, native in zip(cache.layers, natives, strict=True):
            each.native = native
        assert asked == [["append", "attend"]] * 4
        assert module_asked == ["num_threads"]  # once a step, not a layer
    assert torch.isfinite(logits).all()
    assert cache.get_seq_length() == 297


def lines_executed(call):
    """How often each Python function ran a line during a call: {(file, function): lines}; a loop's turns all count."""
    lines = collections.Counter()

    def trace(frame, event, _):
        if event == "line":
            lines[frame.f_code.co_filename, frame.f_code.co_qualname] += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return lines


def test_a_loop_over_tokens_would_show():
    few, many = (lines_executed(lambda n=n: [-token for token in range(n)]) for n in (8, 80))
    assert sum(many.values()) > sum(few.values()) + 70


@pytest.mark.parametrize("new", [1, 16, 40], ids=lambda new: f"{new} new")
def test_no_python_runs_once_a_token_held(model, text, new):
    """A step after 300 tokens runs the lines that one after 560 runs; 256 is gemma's window."""
    counts = []
    for held in (300, 560):
        cache = filled(model, text[:, :held])
        ids = text[:, held : held + new]
        forward(model, ids, copy.deepcopy(cache))  # what only a first run does is not meant
        counts.append(lines_executed(lambda cache=cache, ids=ids: forward(model, ids, cache)))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("held", [0, 300], ids=["first prefill", "later chunk"])
def test_no_python_runs_once_a_new_token(model, text, held):
    counts = []
    for new in (24, 240):
        cache = filled(model, text[:, :held]) if held else Int4Cache(model.config)
        ids = text[:, held : held + new]
        forward(model, ids, copy.deepcopy(cache))
        counts.append(lines_executed(lambda cache=cache, ids=ids: forward(model, ids, cache)))
    assert counts[0] == counts[1]


def test_the_stopwatch_takes_out_what_it_is_on_and_no_more(monkeypatch):
    clock = iter([10.0, 11.0, 13.0, 14.0, 17.0, 20.0])  # step begins; two calls of 2 and 3 seconds; step ends
    monkeypatch.setattr(bench_glue.time, "perf_counter", lambda: next(clock))
    watch = bench_glue.Stopwatch()
    seen = []
    call = watch.on(lambda *args, **kwargs: seen.append((args, kwargs)))
    assert watch.watched_step(lambda: (call(1, b=2), call())) == (10.0, 5.0, 2)
    assert seen == [((1,), {"b": 2}), ((), {})]


def test_the_benchs_caches_take_every_step(monkeypatch):
    """Both arms attend the same states, step by step."""
    from transformers.integrations import sdpa_attention

    import halfbyte.attention

    outs = collections.defaultdict(list)
    for module, name in ((halfbyte.attention, "halfbyte_attention"), (sdpa_attention, "sdpa_attention_forward")):
        inner = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda *a, name=name, inner=inner, **k: outs[name].append(inner(*a, **k)[0].clone()) or (None, None),
        )
    bench_glue.bench_glue(prefixes=(40,), new_tokens=16, layers=2, recipe="passthrough")
    ours, theirs = outs["halfbyte_attention"], outs["sdpa_attention_forward"]
    assert len(ours) == len(theirs) == 2 * (1 + 16 + 16)  # the first packs the prompt, a block warms up
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=0, atol=1e-4)
