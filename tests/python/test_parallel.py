"""Models spread over processes by tensor parallelism, and over devices by device_map."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import MODELS

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.utils import is_accelerate_available  # noqa: E402

from halfbyte import Int4Cache  # noqa: E402
from parallel_worker import observe  # noqa: E402

WORKER = Path(__file__).with_name("parallel_worker.py")
RANKS = 2
LIMIT_S = 300  # a quiet machine needs about 15

needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this build of torch has no gloo, the backend of tensor parallelism on a CPU",
)


def run_ranks(inputs, folder):
    """Runs the worker in RANKS processes over the loopback interface: what each saw, or a failure with their output."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={RANKS}"]
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    process = subprocess.Popen(
        [sys.executable, *launch, str(WORKER), str(MODELS), str(inputs), str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the ranks too, which wait for each other
        output, _ = process.communicate()
        pytest.fail(f"{RANKS} processes took more than {LIMIT_S} s; they printed:\n{output[-4000:]}")
    if process.returncode:
        pytest.fail(f"one of {RANKS} processes failed (status {process.returncode}); they printed:\n{output[-8000:]}")
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.fixture(scope="module")
def seen(text, qwen, gemma, tmp_path_factory):
    """{model name: (what one process sees, [what each rank sees])}"""
    folder = tmp_path_factory.mktemp("parallel")
    inputs = {"prompt": text[:, :290], "forced": text[0, 290:322]}
    torch.save(inputs, folder / "inputs.pt")
    ranks = run_ranks(folder / "inputs.pt", folder)
    models = {"tiny-qwen": qwen, "tiny-gemma": gemma}
    return {name: (observe(model, inputs), [rank[name] for rank in ranks]) for name, model in models.items()}


@needs_gloo
@pytest.mark.parametrize("name", ["tiny-qwen", "tiny-gemma"])
@pytest.mark.parametrize("recipe", ["passthrough", "default"])
def test_ranks_generate_the_tokens_of_one_process(seen, name, recipe):
    one, ranks = seen[name]
    for rank in ranks:
        assert torch.equal(rank[recipe]["tokens"], one[recipe]["tokens"])


@needs_gloo
@pytest.mark.parametrize("name", ["tiny-qwen", "tiny-gemma"])
def test_logits_of_ranks_differ_by_little_of_what_4_bits_lose(seen, name):
    """Ranks sum in an order of their own: without codes that is all, with them it tips a few."""
    one, ranks = seen[name]
    lost = (one["default"]["logits"] - one["passthrough"]["logits"]).abs().max()
    for recipe, tolerance in (("passthrough", 1e-4), ("default", lost / 10)):
        assert torch.equal(ranks[0][recipe]["logits"], ranks[1][recipe]["logits"])
        assert (ranks[0][recipe]["logits"] - one[recipe]["logits"]).abs().max() < tolerance


def assert_same_states(rank, one, part, tolerance):
    """A rank's K and V are one process's in the heads `part`, but for `tolerance` of their mean size."""
    for name in ("keys", "values"):
        for got, wanted in zip(rank[name], one[name], strict=True):
            wanted = wanted[:, part]
            assert got.shape == wanted.shape
            assert (got - wanted).abs().mean() < tolerance * wanted.abs().mean()


@needs_gloo
@pytest.mark.parametrize(("recipe", "tolerance"), [("passthrough", 1e-5), ("default", 1e-3)])
def test_a_rank_holds_its_own_heads_and_no_others(seen, recipe, tolerance):
    one, ranks = seen["tiny-qwen"]
    assert one[recipe]["kv_heads"] == [2] * 4
    for index, rank in enumerate(ranks):
        assert rank[recipe]["kv_heads"] == [1] * 4
        assert rank[recipe]["nbytes"] == pytest.approx(one[recipe]["nbytes"] / 2, rel=0.01)
        assert_same_states(rank[recipe], one[recipe], slice(index, index + 1), tolerance)


@needs_gloo
@pytest.mark.parametrize(("recipe", "tolerance"), [("passthrough", 1e-5), ("default", 1e-3)])
def test_attention_that_is_not_split_is_held_whole_by_every_rank(seen, recipe, tolerance):
    one, ranks = seen["tiny-gemma"]
    for rank in ranks:
        assert rank[recipe]["kv_heads"] == [1] * 4
        assert rank[recipe]["nbytes"] == one[recipe]["nbytes"]
        assert_same_states(rank[recipe], one[recipe], slice(None), tolerance)


@needs_gloo
def test_a_short_prompts_offset_comes_from_the_ranks_part_of_the_key_bias(seen):
    one, ranks = seen["tiny-qwen"]
    for index, rank in enumerate(ranks):
        assert_same_states(rank["short"], one["short"], slice(index, index + 1), 1e-3)


# device_map: this machine's devices are the CPU and the disk.
PARTS = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", *(f"model.layers.{i}" for i in range(4)))
MAPS = {
    "one device": {"": "cpu"},
    "module by module": dict.fromkeys(PARTS, "cpu"),
    "auto": "auto",
    "two layers on disk": dict.fromkeys(PARTS, "cpu") | {"model.layers.0": "disk", "model.layers.2": "disk"},
}


@pytest.mark.skipif(not is_accelerate_available(), reason="transformers refuses device_map without accelerate")
@pytest.mark.parametrize("name", ["tiny-qwen", "tiny-gemma"])
@pytest.mark.parametrize("where", MAPS)
@pytest.mark.parametrize("tokens", [280, 5])
def test_device_map_changes_nothing(request, text, tmp_path, name, where, tokens):
    whole = request.getfixturevalue(name.removeprefix("tiny-"))
    placed = AutoModelForCausalLM.from_pretrained(
        MODELS / name, dtype=torch.float32, device_map=MAPS[where], offload_folder=tmp_path
    ).eval()
    logits, bytes_held = [], []
    for model in (whole, placed):
        model.set_attn_implementation("halfbyte")
        cache = Int4Cache(model.config)
        with torch.no_grad():
            pieces = text[:, :tokens], text[:, tokens : tokens + 1], text[:, tokens + 1 : tokens + 40]
            logits.append(torch.cat([model(ids, past_key_values=cache).logits for ids in pieces], dim=1))
        bytes_held.append(cache.nbytes)
    assert torch.equal(logits[0], logits[1])
    assert bytes_held[0] == bytes_held[1]
