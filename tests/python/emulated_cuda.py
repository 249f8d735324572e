"""The CUDA kernels on this machine's processor: layers of tensors in CPU memory that are told they are on a GPU.

Needs the library that the C++ tests build, of the kernels' own sources on an emulator; `pretend` skips without it.
"""

import contextlib
import ctypes
from pathlib import Path

import pytest
import torch

from halfbyte import _cuda, cuda_kernels, layer
from halfbyte.cuda_kernels import CudaKernels
from halfbyte.gpu_layer import GpuLayer

BUILD = Path(__file__).resolve().parents[2] / "build" / "release" / "tests" / "cuda" / "emulator"
LIBRARY = BUILD / "libhalfbyte_cuda_plain.so"
DEVICE = torch.device("cpu", 0)  # which has a number, as GPUs do
PROCESSORS, SHARED_BYTES = 2, 100 << 10  # of a small GPU: thread blocks run one after the other, few and narrow ones


@contextlib.contextmanager
def pretend():
    """Within it, `Int4Layer` and `GpuLayer` use the emulated library for CPU tensors."""
    if not LIBRARY.is_file():
        pytest.skip(f"no emulated CUDA library: {LIBRARY} is built with the C++ tests")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HALFBYTE_CUDA_LIBRARY", str(LIBRARY))
        for cached in (_cuda.load, _cuda.why_not, cuda_kernels._shared_tables):
            cached.cache_clear()
        library = _cuda.load()
        library.halfbyte_emulator_device(PROCESSORS, SHARED_BYTES)
        patch.setattr(CudaKernels, "_own_flag", _own_flag)
        patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
        patch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        patch.setattr(layer, "make_room", _make_room)
        own = layer.Int4Layer._make_room

        def make_room(self, *args, **kwargs):
            native = own(self, *args, **kwargs)
            self._on_cpu = False
            return native

        patch.setattr(layer.Int4Layer, "_make_room", make_room)
        yield library
    for cached in (_cuda.load, _cuda.why_not, cuda_kernels._shared_tables):
        cached.cache_clear()


def _own_flag(kernels):
    kernels._flag = torch.zeros(1, dtype=torch.int32)
    kernels._failed = ctypes.c_int32.from_address(kernels._flag.data_ptr())


def _make_room(device, exact, parts=None, **config):
    if parts is None:
        return GpuLayer(CudaKernels, DEVICE, **config)
    return GpuLayer.load(CudaKernels, DEVICE, parts, **config)
