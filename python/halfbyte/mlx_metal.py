"""The Metal kernels for MLX: what mx.fast.metal_kernel takes, made from the text that PyTorch compiles.

Not yet run on Apple hardware. mx.fast.metal_kernel writes a kernel's signature itself: the entry points' bodies go in
its source, all before them in its header. halfbyte.mlx_layer calls them.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from .metal import HEAD_DIMS, source

ENTRY_POINTS = "// ---- Entry points\n"  # the last part of src/gpu/kernels.metal
SIGNATURE = re.compile(r"kernel void ([\w#]+)\((.*?)HALFBYTE_AT\) \{(.*?)\n *\}", re.S)
PARAMETER = re.compile(r"(constant|device)( const)? ([\w:]+)([*&]) (\w+) \[\[buffer")


class MlxKernel(NamedTuple):
    """Arguments of mx.fast.metal_kernel, as keywords: mx.fast.metal_kernel(**kernel._asdict())."""

    name: str
    input_names: list[str]
    output_names: list[str]
    source: str
    header: str


def header() -> str:
    """The kernels' text up to the entry points, with numbers read from device memory, where MLX puts its inputs."""
    text = source().split(ENTRY_POINTS)[0]
    return re.sub(r"constant (\w+)&", r"device const \1&", text)


@functools.cache
def kernels() -> dict[str, MlxKernel]:
    """{name: kernel} of every entry point.

    Inputs are the buffers of src/gpu/kernels.metal in their order, but for those that the kernel writes, which are
    outputs, in their order; numbers are int64 and float32 arrays. MLX puts arrays of fewer than eight elements in
    another address space: all inputs take eight or more, those that stand for nothing too. Outputs start as zeros
    (init_value=0): what encode writes is the pages of that call, at the places its table gives, and nothing else.
    `grid` is the total number of threads.
    """
    before = header()
    text = source().split(ENTRY_POINTS)[1].replace("\\\n", "\n")
    text = re.sub(r" +\n", "\n", text)
    made = {}
    for dim in HEAD_DIMS:
        padded = -(-dim // 32) * 32
        for name, parameters, body in SIGNATURE.findall(text):
            for bits in (4, 8) if "Bits" in name else (0,):
                words = {"D": dim, "Bits": bits, "Padded": padded}
                kernel = _kernel(*(_fill(part, words) for part in (name, parameters, body)), before)
                made[kernel.name] = kernel
    return made


def _fill(text, words):
    """The macro's text with its arguments in place."""
    text = re.sub(
        r"##(\w+)##(\w+)##(\w+)|##(\w+)", lambda m: "".join(str(words.get(g, g)) for g in m.groups() if g), text
    )
    return re.sub(r"\b(D|Bits|Padded)\b", lambda m: str(words[m[1]]), text)


def _kernel(name, parameters, body, before) -> MlxKernel:
    inputs, outputs, lines = [], [], []
    for space, const, kind, how, parameter in PARAMETER.findall(parameters):
        # The pool is declared writable everywhere; encode alone writes to it.
        written = space == "device" and not const and (parameter != "pool" or "encode" in name)
        (outputs if written else inputs).append(parameter)
        body = re.sub(rf"\b{parameter}\b", f"{parameter}_", body)
        if how == "&":
            lines.append(f"device const {kind}& {parameter}_ = *(device const {kind}*){parameter};")
        elif written:
            lines.append(f"device {kind}* {parameter}_ = (device {kind}*){parameter};")
        else:
            # What a kernel of ours only reads may be declared writable; MLX's inputs are not.
            plain = "" if parameter == "pool" else "const "
            lines.append(f"device {plain}{kind}* {parameter}_ = (device {plain}{kind}*){parameter};")
    lines.append("const uint group = threadgroup_position_in_grid.x, tid = thread_position_in_threadgroup.x;")
    text = "\n".join(lines + [line.strip() for line in body.strip().splitlines()])
    return MlxKernel(f"halfbyte_{name}", inputs, outputs, text + "\n", before)
