"""A stand-in for torch.mps.compile_shader: calls the emulator of tests/gpu by the rules that PyTorch documents.

What it shows is that arguments are put together rightly: their order, types, sizes and strides, and the numbers of
threads. Whether Apple's compiler and GPUs do the same with them, only a Mac can show.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from gpu_walk import pretend_gpu
from halfbyte.metal import source

ROOT = Path(__file__).parents[2]
EMULATOR = ROOT / "tests" / "gpu" / "emulator"
BUILT = ROOT / "build" / "emulator"
CASTS = {"fp16": torch.float16, "bf16": torch.bfloat16, "int32": torch.int32, "int16": torch.int16,
         "int8": torch.int8, "uint8": torch.uint8}  # fmt: skip
MAX_THREADS, MAX_CONSTANT_BYTES, MAX_BUFFERS = 1024, 4096, 31


def emulator():
    """The emulator with the kernels that the package ships, compiled when either has changed (ten seconds)."""
    compiler = next(
        (name for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and shutil.which(name)), 0
    )
    if not compiler:
        pytest.skip("no C++ compiler to build the emulator of the Metal kernels with")
    sources = [*sorted(EMULATOR.glob("*.cpp")), EMULATOR.parent / "emulator_library.cpp"]
    texts = [path.read_bytes() for path in (*sources, *EMULATOR.glob("*.h"), EMULATOR / "metal_stdlib")]
    key = hashlib.sha256(b"".join([source().encode(), *texts])).hexdigest()[:16]
    file = BUILT / f"{key}.so"
    if not file.exists():
        shutil.rmtree(BUILT, ignore_errors=True)
        BUILT.mkdir(parents=True)
        (BUILT / "halfbyte.metal").write_text(source())
        command = [compiler, "-std=c++20", "-O2", "-fPIC", "-shared", "-Wno-attributes", "-Wno-unknown-pragmas"]
        command += [f"-I{path}" for path in (BUILT, EMULATOR, EMULATOR.parent, ROOT / "src", ROOT / "include")]
        subprocess.run([*command, *map(str, sources), "-o", f"{file}.partial"], check=True)
        os.replace(f"{file}.partial", file)
    return file


class ShaderLibrary:
    """What compile_shader returns: kernels as attributes. schedule: the order of the emulator's threads."""

    def __init__(self, schedule=0):
        self.library = ctypes.CDLL(str(emulator()))
        self.library.halfbyte_emulator_run.restype = ctypes.c_char_p
        self.schedule = schedule
        self.calls = []  # (kernel, threads, group_size)

    def __getattr__(self, name):
        return Kernel(self, name)


class Kernel:
    def __init__(self, shaders, name):
        self.shaders, self.name = shaders, name

    def __call__(self, *args, threads=None, group_size=None, arg_casts=None):
        """Positional arguments are buffers 0, 1, …; threads: the total number of threads, by default the elements of
        the first tensor; both of one dimension here, as our kernels use them."""
        assert len(args) <= MAX_BUFFERS
        casts = arg_casts if isinstance(arg_casts, dict) else dict.fromkeys(range(len(args)), arg_casts)
        kept = [bound(arg, casts.get(i)) for i, arg in enumerate(args)]
        if threads is None:
            threads = next(arg.numel() for arg in args if isinstance(arg, torch.Tensor))
        group_size = MAX_THREADS if group_size is None else group_size
        assert 0 < group_size <= MAX_THREADS
        # Metal would run a smaller last group; our kernels count on whole ones.
        assert threads > 0 and threads % group_size == 0  # noqa: PT018
        addresses = (ctypes.c_void_p * len(kept))(*(tensor.data_ptr() for tensor in kept))
        self.shaders.calls.append((self.name, threads, group_size))
        error = self.shaders.library.halfbyte_emulator_run(
            self.name.encode(), addresses, len(kept), threads // group_size, group_size, self.shaders.schedule
        )
        assert not error, error.decode()


def bound(arg, cast):
    """The memory a kernel sees for one argument: a tensor's own from its storage offset on, a copy of numbers."""
    if isinstance(arg, torch.Tensor):
        return arg
    values = list(arg) if isinstance(arg, (list, tuple)) else [arg]
    if not values or any(type(value) is not type(values[0]) or type(value) not in (int, float) for value in values):
        raise TypeError(f"unsupported argument: {arg!r}")
    dtype = CASTS[cast] if cast else torch.int64 if type(values[0]) is int else torch.float32
    tensor = torch.tensor(values, dtype=dtype)
    assert tensor.numel() * tensor.element_size() <= MAX_CONSTANT_BYTES  # of Metal's setBytes
    return tensor


def pretend_mps(monkeypatch, shaders):
    """Layers of CPU tensors have Metal kernels from now on, with the stand-in behind them."""
    from halfbyte import mps_kernels

    monkeypatch.setattr(mps_kernels, "library", lambda: shaders)
    pretend_gpu(monkeypatch, mps_kernels.MetalKernels, torch.device("cpu"))
