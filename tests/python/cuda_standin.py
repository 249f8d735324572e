"""A stand-in for a CUDA device: the kernels' own sources on the emulator of tests/cuda, tensors in CPU memory.

What it shows is what the kernels compute and what they are told. PTX, timing and what a GPU's memory orders, only a GPU
can show.
"""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "build" / "release"
TARGET = "halfbyte_emulated_cuda_plain"
DEVICE = torch.device("cpu", 0)  # an index, as a GPU has


@functools.cache
def library():
    """libhalfbyte_cuda for the CPU, built where it is missing or old (a minute); skips where that fails."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    if not shutil.which("cmake", path=environment["PATH"]):
        pytest.skip("no cmake to build the emulated CUDA kernels with")
    for command in (["cmake", "--preset", "release"], ["cmake", "--build", "--preset", "release", "--target", TARGET]):
        done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"the emulated CUDA kernels can not be built: {(done.stdout + done.stderr)[-300:]}")
    return BUILT / "tests" / "cuda" / "emulator" / "libhalfbyte_cuda_plain.so"


def pretend_cuda(monkeypatch):
    """CudaKernels run on CPU tensors of the device that is returned; what PyTorch does for CUDA alone does nothing."""
    from halfbyte import _cuda

    zeros = torch.zeros

    def unpinned(*args, pin_memory=False, **options):
        return zeros(*args, **options)

    bound = _cuda.bind(library())
    monkeypatch.setattr(_cuda, "load", lambda: bound)
    monkeypatch.setattr(_cuda, "why_not", lambda index: None)
    monkeypatch.setattr(torch, "zeros", unpinned)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    return DEVICE
