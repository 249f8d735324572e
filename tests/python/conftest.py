"""Models, prompts and runs that the Python tests share."""

from pathlib import Path

import pytest

MODELS = Path(__file__).resolve().parents[2] / "models"


def load(name, dtype="float32"):
    """One of the shipped models, in evaluation mode."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # models this small gain nothing from two, and lose much on a busy machine
    model = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None  # every run is as long as it says
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(scope="session")
def qwen():
    return load("tiny-qwen")


@pytest.fixture(scope="session")
def gemma():
    return load("tiny-gemma")


@pytest.fixture(params=["qwen", "gemma"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def text(qwen):
    """640 token ids sampled from tiny-qwen, [1, 640]: text for both models, which share a tokenizer."""
    import torch
    from transformers import DynamicCache

    torch.manual_seed(7)
    qwen.set_attn_implementation("sdpa")
    start = torch.tensor([[1]])
    return qwen.generate(start, max_new_tokens=639, do_sample=True, past_key_values=DynamicCache(config=qwen.config))


@pytest.fixture
def row_by_row(monkeypatch):
    """Linear layers multiply every row on its own: a product of many rows rounds otherwise than one of a single row."""
    import torch

    linear = torch.nn.functional.linear

    def by_rows(x, weight, bias=None):
        rows = [linear(row[None], weight, bias) for row in x.reshape(-1, x.shape[-1])]
        return torch.cat(rows).reshape(*x.shape[:-1], -1)

    monkeypatch.setattr(torch.nn.functional, "linear", by_rows)


@pytest.fixture
def shaders(monkeypatch):
    """What Metal kernels are called through from now on: the emulator, which notes the calls."""
    from metal_standin import ShaderLibrary, pretend_mps

    library = ShaderLibrary()
    pretend_mps(monkeypatch, library)
    return library


@pytest.fixture
def cuda(monkeypatch):
    """The device of CUDA kernels from now on: a GPU where there is one, else the emulator's."""
    import torch

    from halfbyte import _cuda

    if torch.cuda.is_available() and _cuda.why_not(0) is None:
        return torch.device("cuda", 0)
    from cuda_standin import pretend_cuda

    return pretend_cuda(monkeypatch)
