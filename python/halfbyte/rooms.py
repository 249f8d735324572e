"""Where the codes of a layer live: with the C++ Layer in CPU memory, or in a layer of a GPU; chosen by device."""

import functools
import warnings

import torch

from . import _native


def append_native(native, k, v, counted, answered):
    """`native.append` of CPU tensors K, V [batch, kv_heads, tokens, head_dim]; counted: [batch, tokens] or None."""
    k, k_strides = _rows(k)
    v, v_strides = _rows(v)
    address = 0 if counted is None else counted.data_ptr()
    native.append(k.data_ptr(), v.data_ptr(), k.shape[0], k.shape[2], k_strides, v_strides, address, answered)


def attend_native(native, query, out, scale, chunk, mask, softcap, sinks, exact=False):
    """`native.attend` of CPU tensors, with the arguments of GpuLayer.attend."""
    query, query_strides = _rows(query)
    _, heads, queries, _ = query.shape
    options = {"exact": True} if exact else {}
    if chunk is not None:
        k, v = chunk
        options.update(chunk_k=k.data_ptr(), chunk_v=v.data_ptr())
        options.update(chunk_k_strides=k.stride()[:3], chunk_v_strides=v.stride()[:3])
    if mask is not None:
        options.update(mask=mask.data_ptr(), mask_tokens=mask.shape[3])
        options["mask_strides"] = mask.stride(0), mask.stride(2)
    if softcap:
        options["softcap"] = softcap
    if sinks is not None:
        options["sinks"] = sinks.data_ptr()
    strides = out.stride()
    native.attend(
        query.data_ptr(),
        out.data_ptr(),
        heads,
        queries,
        query_strides,
        (strides[0], strides[2], strides[1]),
        scale,
        **options,
    )


def unpack_native(native, dims, kv_heads, tokens, dtype):
    """The newest `tokens` tokens as K, V [batch, kv_heads, tokens, head_dim] in CPU memory."""
    held = native.visible
    # Here and wherever the extension gets an address: what PyTorch's default dtype and device are does not matter.
    floats = {"dtype": torch.float32, "device": "cpu"}
    parts = [torch.empty(native.batch, kv_heads, held, dim, **floats) for dim in dims]
    if held:
        native.dequantize(*(part.data_ptr() for part in parts))
    return [part[:, :, max(held - tokens, 0) :].to(dtype) for part in parts]


def _rows(tensor):
    """(a tensor whose last dimension lies in one piece, its other strides)"""
    strides = tensor.stride()
    if strides[3] != 1:
        tensor = tensor.contiguous()
        strides = tensor.stride()
    return tensor, strides[:3]


class HostLayer:
    """The C++ Layer for a device that has no kernels here: codes stay in CPU memory, and attention is computed there.

    Everything works and gives what the CPU gives; every step waits for copies to the CPU and back.
    """

    def __init__(self, native, device, kv_heads, dims):
        self.native, self.device, self.kv_heads, self.dims = native, device, kv_heads, dims

    def __getattr__(self, name):
        return getattr(self.native, name)

    def append(self, k, v, counted=None, answered=False):
        append_native(self.native, k.cpu(), v.cpu(), None if counted is None else counted.cpu(), answered)

    def attend(self, query, out, scale, chunk, mask, softcap, sinks, exact=False):
        host = torch.empty(out.shape, dtype=out.dtype, device="cpu")
        chunk = None if chunk is None else [x.cpu() for x in chunk]
        mask, sinks = (None if x is None else x.cpu() for x in (mask, sinks))
        attend_native(self.native, query.cpu(), host, scale, chunk, mask, softcap, sinks, exact)
        out.copy_(host)

    def unpack(self, tokens, dtype):
        parts = unpack_native(self.native, self.dims, self.kv_heads, tokens, dtype)
        return [part.to(self.device) for part in parts]

    def copy(self):
        return HostLayer(self.native.copy(), self.device, self.kv_heads, self.dims)


def _gpu_kernels(device, exact, config):
    """(the class of a layer's kernels on this device, None), or (None, why there is none)."""
    if device.type == "cuda":
        from .cuda_kernels import CudaKernels as Kernels
    elif device.type == "mps":
        from .mps_kernels import MetalKernels as Kernels
    else:
        return None, "there are no kernels for this device"
    return Kernels, Kernels.why_not(device, config, exact)


@functools.cache
def _warn_once(text):
    warnings.warn(text, stacklevel=2)


def make_room(device, exact, parts=None, **config):
    """What holds a layer's codes on `device`, empty or with the content `parts` that another one's save() gave.

    config: as _native.Layer takes it. exact: attention in float32 is wanted, which CUDA's kernels do not compute.
    """
    if device.type != "cpu":
        kernels, reason = _gpu_kernels(device, exact, config)
        if reason is None:
            from .gpu_layer import GpuLayer

            if parts is None:
                return GpuLayer(kernels, device, **config)
            return GpuLayer.load(kernels, device, parts, **config)
        _warn_once(
            f"Int4Cache on {device.type}: {reason}: the cache lives in CPU memory and attention is computed there, "
            "slowly"
        )
    native = _native.Layer(**config) if parts is None else _native.Layer.load(**config, parts=parts)
    if device.type == "cpu":
        return native
    return HostLayer(native, device, config["kv_heads"], (config["head_dim_k"], config["head_dim_v"]))
