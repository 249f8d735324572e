"""Shows on a trained model what a packed cache saves and what it costs: speed, bytes, quality and a continuation."""

from __future__ import annotations

import torch

from .bench_generate import DecodeArm, check_room, generate_row, load_in_dtypes, make_arm
from .calibrate import sample_text
from .evaluate import Score
from .models import encode_text, read_text
from .watch import attention_set_to

PREFIXES = (256, 1024, 4096)
MODELS = ("tiny-qwen", "tiny-gemma")
SCORED_TOKENS = 512  # tokens after the prefix whose predictions are compared
SHOWN_TOKENS = 48  # of the continuation


def demo_text(model, tokenizer, tokens: int, text, seed: int, progress: bool) -> torch.Tensor:
    """Token ids [tokens] to run on: the given file's, or text the model writes itself."""
    if text is None:
        return sample_text(model, tokens, seed, progress)
    ids = encode_text(tokenizer, read_text(text))
    if ids.numel() < tokens:
        raise ValueError(f"text: {str(text)!r} has {ids.numel()} tokens; these prefixes take {tokens}")
    return ids[:tokens]


def score_after_prefix(model, ids, prefix: int) -> tuple[Score, Score]:
    """(full cache, packed cache) scored on ids after the first `prefix`, which both hold; as deployed, block rule."""
    logits = {}
    for packed in (False, True):
        with attention_set_to(model, "sdpa"):
            arm = make_arm(model, ids[:prefix], packed)
            logits[packed] = model(ids[None, prefix:], use_cache=True, **arm.past).logits[0, :-1]
    full, packed = Score(), Score()
    full.add(logits[False], logits[False], ids[prefix + 1 :])
    packed.add(logits[False], logits[True], ids[prefix + 1 :])
    return full, packed


def quality(model, ids, prefix: int) -> dict:
    """{ppl_fp, ppl_int4, kl, top1} over the SCORED_TOKENS after the prefix."""
    full, packed = score_after_prefix(model, ids[: prefix + SCORED_TOKENS + 1], prefix)
    return {
        "ppl_fp": full.ppl,
        "ppl_int4": packed.ppl,
        "kl": packed.kl / packed.tokens,
        "top1": packed.agreed / packed.tokens,
    }


def continuations(model, tokenizer, prompt) -> dict[str, str]:
    """Greedy continuations of the prompt with either cache: {"prompt", "full", "packed", "agree"}."""
    arms: dict[bool, DecodeArm] = {}
    for packed in (False, True):
        with attention_set_to(model, "sdpa"):
            arms[packed] = make_arm(model, prompt, packed)
            arms[packed].decode(SHOWN_TOKENS)
    tokens = {packed: torch.cat(arm.tokens, 1)[0] for packed, arm in arms.items()}
    equal = (tokens[False] == tokens[True]).long().cumprod(0).sum().item()
    return {
        "prompt": tokenizer.decode(prompt[-SHOWN_TOKENS:]),
        "full": tokenizer.decode(tokens[False]),
        "packed": tokenizer.decode(tokens[True]),
        "agree": f"first {equal} of {SHOWN_TOKENS} tokens equal",
    }


@torch.inference_mode()
def demo_model(name: str, prefixes=PREFIXES, text=None, new_tokens=16, rounds=5, seed=0, progress=True):
    """(rows, continuations) of one model; rows have bench generate's keys and ppl_fp, ppl_int4, kl, top1.

    Quality is measured in float32 on text the model samples with `seed`, or on the file `text`.
    """
    from tqdm import tqdm

    models, tokenizer = load_in_dtypes(name)
    model = models["float32"]
    needed = max(prefixes) + SCORED_TOKENS + 1
    check_room(name, model.config, max(prefixes), SCORED_TOKENS + 1)
    ids = demo_text(model, tokenizer, needed, text, seed, progress)
    rows = []
    with tqdm(total=2 * len(prefixes) + 1, desc=name, unit="step", disable=not progress, leave=False) as steps:
        for prefix in prefixes:
            row = generate_row(name, models, ids[:prefix], new_tokens, rounds)
            steps.update()
            rows.append(row | quality(model, ids, prefix))
            steps.update()
        texts = continuations(model, tokenizer, ids[: min(prefixes)])
        steps.update()
    return rows, texts
