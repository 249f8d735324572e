"""Tasks beyond perplexity: how long greedy decoding stays the same, and whether a needle in the context is found."""

from __future__ import annotations

import torch

from .models import cache_argument

GREEDY_PROMPTS = 4
KEY_TOKENS, VALUE_TOKENS = 4, 4


class Greedy:
    """Greedy continuations of prompts by the full cache, and how far others follow them.

    Until the first difference both decode from the same tokens, so one pass over the full cache's text tells where
    another cache would have left it.
    """

    def __init__(self, model, prompts, tokens: int):
        from transformers import DynamicCache

        self.tokens = tokens
        self.texts = []
        for prompt in prompts:
            past = cache_argument(model, DynamicCache(config=model.config))
            step, text = prompt[None], [prompt]
            for _ in range(tokens):
                step = model(step, use_cache=True, **past).logits[:, -1].argmax(-1)[None]
                text.append(step[0])
            self.texts.append(torch.cat(text))

    def figures(self, run) -> dict:
        """{greedy_tokens}: tokens decoded before the first that differs, the mean over prompts; at most all."""
        same = [
            (run(text)[-self.tokens - 1 : -1].argmax(-1) == text[-self.tokens :]).long().cumprod(0).sum().item()
            for text in self.texts
        ]
        return {"greedy_tokens": sum(same) / len(same)}


class Needles:
    """Random tokens with KEY VALUE somewhere inside and KEY at the end: is VALUE what follows?

    A model with induction heads can answer; needle_full says how often the full cache does. Where it rarely does,
    needle_agree, the share of equal first choices at these places, says what packing changed.
    """

    def __init__(self, model, full, count: int, tokens: int, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        self.texts = []
        asked = KEY_TOKENS + VALUE_TOKENS
        for i in range(count):
            text = torch.randint(vocabulary, (tokens,), generator=generator)
            depth = (tokens - 2 * asked) * i // max(count - 1, 1)
            text[-asked:] = text[depth : depth + asked]
            self.texts.append(text)
        self.full = [self._answers(full, text) for text in self.texts]

    def _answers(self, run, text):
        return run(text)[-VALUE_TOKENS - 1 : -1].float().log_softmax(-1)  # VALUE is given, token by token

    def figures(self, run) -> dict:
        found = found_full = agreed = kl = 0.0
        for text, full in zip(self.texts, self.full, strict=True):
            other, value = self._answers(run, text), text[-VALUE_TOKENS:]
            found += (other.argmax(-1) == value).sum().item()
            found_full += (full.argmax(-1) == value).sum().item()
            agreed += (full.argmax(-1) == other.argmax(-1)).sum().item()
            kl += (full.exp() * (full - other)).sum().item()
        asked = len(self.texts) * VALUE_TOKENS
        return {
            "needle": found / asked,
            "needle_full": found_full / asked,
            "needle_agree": agreed / asked,
            "needle_kl": kl / asked,
        }
