"""Trains the two small checkpoints of models/ from scratch: for whoever wants to reproduce or vary them.

DATA holds train.txt and valid.txt (UTF-8). OUT receives tiny-qwen/ and tiny-gemma/, each a Hugging Face checkpoint
in bfloat16 with the tokenizer both share. Needs the `hf` extra and, for a useful result, a GPU:

    python tools/train_tiny.py DATA OUT --minutes 2.6
"""

import argparse
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCAB = 4096
END_OF_TEXT = "<|endoftext|>"
TOKENIZER_CHARACTERS = 60_000_000  # more text no longer changes a vocabulary of 4096
WARMUP_STEPS = 200
FINAL_LR_SHARE = 0.02

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "use_cache": False,
}


def tiny_qwen() -> PreTrainedModel:
    """Qwen2 architecture: 4 heads, 2 KV heads, head size 128, every layer full attention, planted key biases."""
    model = Qwen2ForCausalLM(
        Qwen2Config(
            **COMMON,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=128,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
    )
    plant_key_biases(model)
    return model


def tiny_gemma() -> PreTrainedModel:
    """Gemma-3 architecture: 2 heads, 1 KV head, head size 256, sliding (window 256) and full layers in turn."""
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            **COMMON,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=256,
            query_pre_attn_scalar=256,
            sliding_window=256,
            layer_types=["sliding_attention", "full_attention"] * 2,
            pad_token_id=0,
        )
    )


ARCHITECTURES = {"tiny-qwen": tiny_qwen, "tiny-gemma": tiny_gemma}


@torch.no_grad()
def plant_key_biases(model: PreTrainedModel, seed: int = 7) -> None:
    """Sets large k_proj biases on slow RoPE channels, the pattern that Qwen2.5 checkpoints show.

    A RoPE pair is (i, i + d/2), and pairs 50 … 63 of 64 turn slowest: there a bias stays nearly constant over
    positions. The first and last layer get 6 pairs a head with magnitudes 20 … 150, the others 3 with 8 … 32.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = model.model.layers
    head_dim = model.config.head_dim
    half = head_dim // 2
    for layer_index, layer in enumerate(layers):
        outermost = layer_index in (0, len(layers) - 1)
        n_pairs, low, spread = (6, 20, 130) if outermost else (3, 8, 24)
        for head_bias in layer.self_attn.k_proj.bias.view(-1, head_dim):
            channels = half - 14 + torch.randperm(14, generator=generator)[:n_pairs]
            magnitude = low + spread * torch.rand(n_pairs, generator=generator)
            sign = torch.where(torch.rand(n_pairs, generator=generator) < 0.5, -1.0, 1.0)
            head_bias[channels] = sign * magnitude
            head_bias[channels + half] = -sign * magnitude * torch.rand(n_pairs, generator=generator)


def pieces(text: str, characters: int = 65536) -> Iterator[str]:
    """Cuts a long text at line ends, so that words stay whole."""
    start = 0
    while start < len(text):
        newline = text.find("\n", start + characters)
        end = len(text) if newline < 0 else newline + 1
        yield text[start:end]
        start = end


def train_tokenizer(text: str) -> Tokenizer:
    """Byte-level BPE with VOCAB entries; entry 0 is the end of text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(pieces(text[:TOKENIZER_CHARACTERS]), trainer)
    return tokenizer


def tokenize(tokenizer: Tokenizer, text: str) -> torch.Tensor:
    """Token ids of the whole text, int32 [tokens]."""
    parts = list(pieces(text))
    batches = (tokenizer.encode_batch_fast(parts[i : i + 256]) for i in range(0, len(parts), 256))
    ids = [np.asarray(part.ids, dtype=np.int32) for batch in batches for part in batch]
    return torch.from_numpy(np.concatenate(ids))


def windows(tokens: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """Random windows of the text, int64 [batch, length + 1]: inputs and, one to the right, targets."""
    starts = torch.randint(0, len(tokens) - length, (batch,)).tolist()
    return torch.stack([tokens[start : start + length + 1] for start in starts]).long()


def loss_of(model: torch.nn.Module, window: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in nats of predicting window[:, 1:] from window[:, :-1]."""
    logits = model(input_ids=window[:, :-1]).logits
    return F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())


def learning_rate_share(step: int, progress: float) -> float:
    """Linear warm-up, then a cosine from 1 to FINAL_LR_SHARE; progress runs from 0 to 1."""
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return min(1.0, (step + 1) / WARMUP_STEPS) * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine)


def train(name: str, model: PreTrainedModel, tokens: torch.Tensor, args: argparse.Namespace) -> None:
    """Trains in place until args.minutes have passed or args.steps are done, whichever is first."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]  # biases and norms do not decay: the planted ones stay
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
    )
    on_gpu = args.device.startswith("cuda")
    forward = torch.compile(model) if on_gpu else model
    model.train()
    start = time.monotonic()
    for step in itertools.count():
        seconds = time.monotonic() - start
        progress = max(seconds / (60 * args.minutes), step / args.steps if args.steps else 0.0)
        if progress >= 1.0:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate_share(step, progress)
        window = windows(tokens, args.batch, args.length).to(args.device)
        with torch.autocast(args.device.split(":")[0], dtype=torch.bfloat16, enabled=on_gpu):
            loss = loss_of(forward, window)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % args.report_every == 0:
            print(f"{name}: step {step + 1}, {seconds:.0f} s, loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokens: torch.Tensor, length: int, device: str) -> float:
    """Perplexity over at most 32 windows that do not overlap, each read from an empty context."""
    model.eval()
    losses = [loss_of(model, window[None].long().to(device)) for window in tokens.unfold(0, length + 1, length)[:32]]
    return torch.stack(losses).mean().exp().item()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA", help="folder with train.txt and valid.txt")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the checkpoints")
    parser.add_argument("--models", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES), help="default: both")
    parser.add_argument("--minutes", type=float, default=2.6, help="training time a model (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=0, help="stop after this many steps (default: time alone decides)")
    parser.add_argument("--length", type=int, default=4096, help="tokens a window (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="windows a step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="initial weights and windows (default: %(default)s)")
    parser.add_argument("--report-every", type=int, default=100, help="steps between reports (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: GPU if any")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    texts = {part: (args.data / f"{part}.txt").read_text(encoding="utf-8") for part in ("train", "valid")}
    tokenizer = train_tokenizer(texts["train"])
    tokens = {part: tokenize(tokenizer, text) for part, text in texts.items()}
    for part, ids in tokens.items():
        if len(ids) <= args.length:
            raise SystemExit(f"{args.data / part}.txt has {len(ids)} tokens, --length {args.length} takes more")
    for name in args.models:
        torch.manual_seed(args.seed)
        model = ARCHITECTURES[name]().to(args.device)
        print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
        train(name, model, tokens["train"], args)
        print(f"{name}: validation perplexity {perplexity(model, tokens['valid'], args.length, args.device):.2f}")
        model.config.use_cache = True
        model.to(torch.bfloat16).save_pretrained(args.out / name)
        tokenizer.save(str(args.out / name / "tokenizer.json"))


if __name__ == "__main__":
    main()
