"""A stand-in for mx.fast.metal_kernel: calls the emulator of tests/gpu by the rules that MLX documents.

What it shows is that calls are put together rightly: names, order, types and sizes of inputs and outputs, what outputs
start as, the numbers of threads. Whether MLX and Apple's compiler do the same with them, only a Mac can show.
"""

import ctypes
import re
from typing import ClassVar

import mlx.core as mx
import numpy as np

from metal_standin import MAX_BUFFERS, MAX_THREADS, emulator

FEWEST_IN_DEVICE_MEMORY = 8  # elements: MLX declares smaller inputs as `constant`, which the sources do not expect
NUMPY = {mx.int64: np.int64, mx.int32: np.int32, mx.uint8: np.uint8, mx.float32: np.float32, mx.float16: np.float16,
         mx.bfloat16: np.uint16}  # fmt: skip


class MetalKernel:
    """What mx.fast.metal_kernel returns: the emulator's kernel of that name, called as the source says."""

    calls: ClassVar = []  # names, in order

    def __init__(self, name, input_names, output_names, source, header="", ensure_row_contiguous=True):
        self.name, self.names, self.n_inputs = name, [*input_names, *output_names], len(input_names)
        assert ensure_row_contiguous
        assert name.removeprefix("halfbyte_").split("_")[0] in header
        # The entry point's arguments are its buffers, as local pointers made of MLX's parameters, then its memory.
        given = re.search(r"_entry<.*?>\((.*?),\s+memory,\s+group,\s+tid\);", source, re.S)[1]
        self.buffers = [word.strip().removesuffix("_") for word in given.split(",")]
        assert sorted(self.buffers) == sorted(self.names)
        for buffer in self.buffers:
            assert re.search(rf"{buffer}_ = [^;]*\b{buffer};", source)
        self.library = ctypes.CDLL(str(emulator()))
        self.library.halfbyte_emulator_run.restype = ctypes.c_char_p

    def __call__(self, *, inputs, output_shapes, output_dtypes, grid, threadgroup, template=None, init_value=None):
        """grid: the total number of threads; init_value: what all outputs start as, anything if there is none."""
        assert template is None
        assert len(inputs) == self.n_inputs
        assert len(self.names) <= MAX_BUFFERS
        assert all(isinstance(x, mx.array) and x.size >= FEWEST_IN_DEVICE_MEMORY for x in inputs)
        read = [np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x) for x in map(mx.contiguous, inputs)]
        written = [np.empty(shape, NUMPY[dtype]) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
        for x in written:
            x.reshape(-1).view(np.uint8)[:] = 0xA5 if init_value is None else 0
        assert init_value in (None, 0)
        places = dict(zip(self.names, [*read, *written], strict=True))
        addresses = (ctypes.c_void_p * len(places))(*(places[name].ctypes.data for name in self.buffers))
        (threads, *rest), (group, *ones) = grid, threadgroup
        assert rest == ones == [1, 1]
        assert threads % group == 0  # Metal would run a smaller last group; our kernels count on whole ones
        assert group <= MAX_THREADS
        name = self.name.removeprefix("halfbyte_")
        MetalKernel.calls.append(name)
        error = self.library.halfbyte_emulator_run(name.encode(), addresses, len(places), threads // group, group, 0)
        assert not error, error.decode()
        return [
            mx.array(x).view(dtype) if dtype == mx.bfloat16 else mx.array(x)
            for x, dtype in zip(written, output_dtypes, strict=True)
        ]


def pretend_metal(monkeypatch):
    """MLX's default device has Metal from now on, with the stand-in for its kernels."""
    from halfbyte import mlx_layer

    mlx_layer._kernel.cache_clear()
    monkeypatch.setattr(mx.fast, "metal_kernel", MetalKernel)
    monkeypatch.setattr(mlx_layer, "has_metal", lambda: True)
    monkeypatch.setattr(MetalKernel, "calls", [])
    return MetalKernel.calls
