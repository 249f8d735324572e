"""Whose threads attention and packing run on: PyTorch's own where there are any, and never more than it was told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import load

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import DynamicCache  # noqa: E402

from halfbyte import Int4Cache, _native  # noqa: E402

needs_tasks = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in Linux's /proc")
needs_gomp = pytest.mark.skipif(
    not list(Path(torch.__file__).parent.glob("lib/libgomp*.so*")), reason="this build of torch has no GNU OpenMP"
)


def observe():
    """Threads that each run starts, as JSON: called in a process of its own, where no other test has started any."""
    model = load("tiny-qwen")
    ids = torch.arange(2000)[None] % 500

    def started(cache, attention):
        before = set(os.listdir("/proc/self/task"))
        model.set_attn_implementation(attention)
        model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
        return len(set(os.listdir("/proc/self/task")) - before)

    seen = {"one thread": started(Int4Cache(model.config), "halfbyte")}
    torch.set_num_threads(3)
    seen["torch alone"] = started(DynamicCache(config=model.config), "sdpa")
    seen["torch's OpenMP"] = started(Int4Cache(model.config), "halfbyte")
    _native.use_openmp("")
    seen["own pool"] = started(Int4Cache(model.config), "halfbyte")
    torch.set_num_threads(2)
    seen["own pool, fewer"] = started(Int4Cache(model.config), "halfbyte")
    print(json.dumps(seen))


@needs_tasks
@needs_gomp
def test_no_thread_is_started_beside_those_of_torch():
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    run = subprocess.run(
        [sys.executable, "-c", "import test_threads; test_threads.observe()"],
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout.splitlines()[-1])
    assert seen["torch alone"] >= 2  # so that the zero behind it says something
    assert seen["torch's OpenMP"] == 0
    assert seen["one thread"] == 0
    assert seen["own pool"] == 2  # and what the zero would be if the cache brought its own
    assert seen["own pool, fewer"] == 1  # a pool of another size takes the old one's place
