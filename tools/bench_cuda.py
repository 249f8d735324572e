"""Times libhalfbyte_cuda on one GPU: attention against PyTorch's flash attention in fp16, encoding, and copying.

Example: python3 tools/bench_cuda.py build/release/libhalfbyte_cuda.so --json cuda.json
"""

import argparse
import importlib.util
import json
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as functional

# The bindings alone: the package itself need not be installed.
_spec = importlib.util.spec_from_file_location(
    "halfbyte_cuda_bindings", Path(__file__).resolve().parents[1] / "python/halfbyte/_cuda.py"
)
cuda = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cuda)

DTYPES = {torch.float16: 1, torch.bfloat16: 2}
FLUSH_BYTES = 100 << 20  # twice the L2 cache of an H100: nothing timed finds its input there
REPEATS = 20
COPY_BYTES = 1 << 30
PAGE_TOKENS = 64


def microseconds(call):
    """Median time of call(stream), replayed as a CUDA graph with a cold L2 cache."""
    call(torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(torch.cuda.current_stream().cuda_stream)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def view(tensor):
    return cuda.View(tensor.data_ptr(), *tensor.stride()[:3])


class PackedLayer:
    """Random K and V [batch, kv_heads, tokens, head_dim], and the same packed by the library."""

    def __init__(self, library, batch, kv_heads, head_dim, tokens, dtype, v_group=0, search=True):
        self.library = library
        self.batch, self.tokens = batch, tokens
        self.description = cuda.LayerDescription(
            *(kv_heads, head_dim, head_dim, DTYPES[dtype]), *(4, 4, 32, v_group, 16, search, 1), *(1, 0, 0)
        )
        self.k, self.v = (torch.randn(batch, kv_heads, tokens, head_dim, device="cuda", dtype=dtype) for _ in "kv")
        self._kept = []
        self.k_tables, self.v_tables = self._tables(self.k, 0), self._tables(self.v, 1)
        self.head_bytes = library.halfbyte_cuda_page_bytes(self.description)
        pages = -(-tokens // PAGE_TOKENS)
        self.pages = torch.zeros(batch * pages, kv_heads * self.head_bytes, dtype=torch.uint8, device="cuda")
        addresses = torch.arange(batch * pages, device="cuda") * self.pages.stride(0) + self.pages.data_ptr()
        self.table = addresses.view(batch, pages)
        self.bad = torch.zeros(1, dtype=torch.int32, device="cuda")

    def _tables(self, x, is_v):
        dim, library = x.shape[3], self.library
        rotation = torch.empty(dim, dim)
        library.halfbyte_cuda_rotation(self.description, is_v, rotation.data_ptr())
        fragments = torch.empty(library.halfbyte_cuda_fragment_bytes(self.description, is_v), dtype=torch.uint8)
        if fragments.numel():
            library.halfbyte_cuda_fragments(self.description, is_v, rotation.data_ptr(), fragments.data_ptr())
        offset = x[:, :, :1024].float().mean(2).cpu()
        rotated = (offset.double() @ rotation.double().T).float()
        tensors = [t.contiguous().cuda() for t in (rotation, rotation.T, fragments, offset, rotated)]
        self._kept += tensors
        return cuda.Tables(*(t.data_ptr() or None for t in tensors), None, None)

    @property
    def device_pages(self):
        return cuda.Pages(self.table.data_ptr(), self.table.shape[1], 0)

    def encoder(self, tokens):
        call = cuda.Encode(self.description, self.k_tables, self.v_tables, self.device_pages)
        call.batch, call.tokens, call.limit, call.bad = self.batch, tokens, 1e4, self.bad.data_ptr()
        call.k, call.v = view(self.k), view(self.v)

        def run(stream):
            call.stream = stream
            check(self.library, self.library.halfbyte_cuda_encode(call))

        return run

    def attender(self, query, out, packed):
        """Attention of one query token: tokens below `packed` are read packed, the rest as they came."""
        call = cuda.Attend(self.description, self.k_tables, self.v_tables, self.device_pages)
        call.batch, call.heads, call.queries, call.causal = self.batch, query.shape[1], 1, 1
        call.scale, call.length, call.packed_end, call.kept = query.shape[3] ** -0.5, self.tokens, packed, packed
        call.q, call.out = view(query), view(out)
        call.raw[0] = cuda.Raw(view(self.k), view(self.v), 0, packed, self.tokens, 0)
        call.n_raw = 1
        space = torch.empty(self.library.halfbyte_cuda_attend_space(call), dtype=torch.uint8, device="cuda")
        arrivals = torch.zeros(self.batch * query.shape[1], dtype=torch.int32, device="cuda")
        call.space, call.arrivals = space.data_ptr(), arrivals.data_ptr()
        self._kept += [space, arrivals]

        def run(stream):
            call.stream = stream
            check(self.library, self.library.halfbyte_cuda_attend(call))

        return run


def check(library, error):
    if error:
        sys.exit(f"CUDA: {library.halfbyte_cuda_error(error).decode()}")


def bench_copy():
    """Bytes read and written a second by a large device-to-device copy."""
    source, target = (torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
    source.random_()
    return 2 * COPY_BYTES / microseconds(lambda stream: target.copy_(source)) * 1e6


def bench_attend(library, copy, batch, heads, kv_heads, head_dim, tokens, v_group=0):
    layer = PackedLayer(library, batch, kv_heads, head_dim, tokens, torch.float16, v_group)
    packed = (tokens - 1) // 16 * 16
    layer.encoder(packed)(torch.cuda.current_stream().cuda_stream)
    query = torch.randn(batch, heads, 1, head_dim, device="cuda", dtype=torch.float16)
    out = torch.full_like(query, float("nan"))
    packed_us = microseconds(layer.attender(query, out, packed))
    folded = query.view(batch, kv_heads, heads // kv_heads, head_dim)  # the group as query length: K and V read once
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        want = functional.scaled_dot_product_attention(folded, layer.k, layer.v).view_as(out).float()
        flash_us = microseconds(lambda stream: functional.scaled_dot_product_attention(folded, layer.k, layer.v))
    rate = layer.pages.numel() / packed_us * 1e6
    return {
        "what": f"attend B={batch} {heads}/{kv_heads} d{head_dim} T={tokens} V g{v_group or 'whole'}",
        "int4_us": packed_us,
        "sdpa_us": flash_us,
        "ratio": flash_us / packed_us,
        "tb_per_s": rate * 1e-12,
        "of_copy": rate / copy,
        "distance_to_fp16": float((out.float() - want).norm() / want.norm()),
    }


def bench_encode(library, copy, vectors, head_dim, dtype, v_group=0, search=True):
    layer = PackedLayer(library, 1, 2, head_dim, vectors // 2, dtype, v_group, search)
    took = microseconds(layer.encoder(vectors // 2))
    rate = (4 * vectors * head_dim + layer.pages.numel()) / took * 1e6
    return {
        "what": f"encode 2x{vectors} d{head_dim} {str(dtype)[6:]} V g{v_group or 'whole'} search {search}",
        "int4_us": took,
        "tb_per_s": rate * 1e-12,
        "of_copy": rate / copy,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", help="libhalfbyte_cuda.so")
    parser.add_argument("--json", help="write the rows there as well")
    options = parser.parse_args()
    library = cuda.bind(Path(options.library).resolve())
    copy = bench_copy()
    rows = [{"what": "copy", "device": torch.cuda.get_device_name(), "tb_per_s": copy * 1e-12}]
    shapes = [(batch, 12, 2, 128, 32768) for batch in (1, 8, 32)]
    shapes += [(32, 12, 2, 128, 32768, 32), (32, 32, 8, 128, 32768), (32, 4, 1, 256, 32768), (32, 14, 2, 64, 32768)]
    shapes += [(1, 12, 2, 128, 256), (1, 12, 2, 128, 4096)]
    rows += [bench_attend(library, copy, *shape) for shape in shapes]
    half = torch.float16
    cases = [
        (128, half, 0),
        (128, half, 32),
        (128, half, 0, False),
        (128, torch.bfloat16, 0),
        (64, half, 0),
        (256, half, 0),
    ]
    rows += [bench_encode(library, copy, 262144, *case) for case in cases]
    for row in rows:
        numbers = (f"{name} {value:.3g}" for name, value in row.items() if isinstance(value, float))
        print(f"{row['what']:55}", *numbers, sep="  ")
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
