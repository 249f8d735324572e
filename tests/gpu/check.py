#!/usr/bin/env python3
"""Checks of the Metal text that need no run on the emulator, or many.

usage: check.py types TEXT              address spaces, by clang; then the same with words exchanged, which must fail
       check.py limits TEXT             threadgroup memory, threads, buffers; words that Metal does not have
       check.py barriers TEXT PROGRAM   PROGRAM, built for ThreadSanitizer, must fail without any one barrier
       check.py coverage TEXT PROGRAM OBJECTS   lines that PROGRAM's tests run, from OBJECTS' .gcda
"""

import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
MAX_SHARED_BYTES, MAX_THREADS, MAX_BUFFERS = 32 << 10, 1024, 31
LEAST_COVERAGE = 0.95
N_MUTANTS = 60  # of address spaces

CLANG_FLAGS = [
    *("-x", "clcpp", "-cl-std=clc++2021", "-target", "spir64", "-Xclang", "-finclude-default-header"),
    *("-Xclang", "-cl-ext=+cl_khr_fp16,-__opencl_c_pipes,-__opencl_c_device_enqueue"),
    *("-D__METAL_VERSION__=310", f"-I{HERE / 'typecheck'}", "-Wall", "-Wextra", "-Werror"),
    # Attributes are Metal's; a constant that only they name counts as unused.
    *("-Wno-unknown-attributes", "-Wno-unused-const-variable", "-fsyntax-only"),
]


def fail(message: str) -> None:
    sys.exit(f"error: {message}")


def find_clang() -> str:
    for name in ("clang", *(f"clang-{version}" for version in range(21, 13, -1))):
        if shutil.which(name):
            return name
    fail("no clang: the address spaces of the Metal text can not be checked. Debian: apt-get install clang")


def compile_text(clang: str, text: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([clang, *CLANG_FLAGS, *flags, "-"], input=text, text=True, capture_output=True)


def unnamed_spaces(clang: str, text: str) -> list[str]:
    """Pointers and references whose address space is left out, which Metal refuses and OpenCL takes as `generic`."""
    dump = compile_text(clang, text, "-Xclang", "-ast-dump", "-Xclang", "-ast-dump-filter=halfbyte").stdout
    declared = re.findall(r"(?:ParmVar|Var|Field)Decl .*?(\w+) '([^']*__generic[^']*)'", dump)
    return sorted({f"{name}: {kind}" for name, kind in declared if not re.fullmatch(r"col|used|implicit|\d+", name)})


def mutants_of_spaces(text: str) -> list[tuple[int, str]]:
    """The text with one address space exchanged: (line, text)."""
    other = {"device": "threadgroup", "threadgroup": "device", "constant": "device", "thread": "device"}
    other |= {"gpu_global": "gpu_shared", "gpu_shared": "gpu_global", "gpu_local": "gpu_global"}
    found = []
    for match in re.finditer(r"\b(gpu_global|gpu_shared|gpu_local|device|threadgroup|thread|constant)\b(?= )", text):
        start = text.rfind("\n", 0, match.start()) + 1
        line = text[start : text.find("\n", match.start())]
        if not line.startswith(("#", "//")) and "//" not in text[start : match.start()]:
            found.append(
                (text.count("\n", 0, start) + 1, text[: match.start()] + other[match[1]] + text[match.end() :])
            )
    return found


def check_types(path: Path) -> None:
    clang, text = find_clang(), path.read_text(encoding="utf-8")
    result = compile_text(clang, text)
    if result.returncode:
        fail(f"the Metal text has wrong types\n{result.stderr}")
    if unnamed := unnamed_spaces(clang, text):
        fail("no address space is named for " + "; ".join(unnamed))
    mutants = mutants_of_spaces(text)
    chosen = random.sample(mutants, min(N_MUTANTS, len(mutants)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda mutant: compile_text(clang, mutant[1]).returncode, chosen))
    missed = [line for (line, _), code in zip(chosen, results, strict=True) if code == 0]
    if missed:
        fail(f"{len(missed)} of {len(chosen)} exchanged address spaces compile: lines {sorted(missed)}")
    print(f"types are right; {len(chosen)} of {len(mutants)} exchanged address spaces tried, all refused")


def preprocess(path: Path) -> str:
    """The kernels with all macros expanded, and constants as numbers."""
    flags = [flag for flag in CLANG_FLAGS if flag not in ("-fsyntax-only", "-finclude-default-header")]
    flags.remove("-Xclang")
    result = subprocess.run([find_clang(), *flags, "-E", "-P", str(path)], text=True, capture_output=True, check=True)
    return result.stdout


def constants(text: str) -> dict[str, int]:
    """Integers that the text names, by evaluating their definitions in order."""
    values: dict[str, int] = {}
    for name, expression in re.findall(r"__constant constexpr int (k\w+) = ([^;]+);", text):
        values[name] = int(eval(expression.replace("/", "//"), {}, values))
    return values


def floats_of(expression: str, values: dict[str, int]) -> int:
    """The size of a kernel's threadgroup memory, which may call attend_floats or finish_floats."""
    rows = values["kTileRows"]
    functions = {
        "attend_floats": lambda d, padded, pairs: rows * (d + padded + 2 + 2 * pairs),
        "finish_floats": lambda k, padded, v: rows * (k + padded + v + values["kRawTokens"] + 2),
    }
    return int(eval(expression.replace("halfbyte::gpu::", ""), functions, dict(values)))


def check_limits(path: Path) -> None:
    text = preprocess(path)
    values = constants(text)
    pattern = r"max_total_threads_per_threadgroup\(([^)]*)\)\]\] kernel void (\w+)\((.*?)\) \{(.*?)\n?\}"
    found = re.findall(pattern, text, re.DOTALL)
    largest = 0
    for threads, name, parameters, body in found:
        n_threads = values[threads.split("::")[-1]]
        buffers = [int(i) for i in re.findall(r"\[\[buffer\((\d+)\)\]\]", parameters)]
        arrays = re.findall(r"__local float4 \w+\[\((.*?)\) / 4\];", body)
        if len(arrays) != 1 or body.count("__local float4") != 1:
            fail(f"{name}: its threadgroup memory is not one array of known size")
        n_bytes = 4 * floats_of(arrays[0], values)
        largest = max(largest, n_bytes)
        if n_bytes > MAX_SHARED_BYTES or n_threads > MAX_THREADS or n_threads % 32:
            fail(f"{name}: {n_bytes} bytes of threadgroup memory, {n_threads} threads")
        if buffers != list(range(len(buffers))) or len(buffers) > MAX_BUFFERS:
            fail(f"{name}: buffers {buffers}")
    names = {name for _, name, _, _ in found}
    for d in (64, 80, 96, 128, 256):
        expected = {f"{verb}_d{d}_int{bits}" for verb in ("encode", "decode") for bits in (4, 8)}
        if missing := (expected | {f"attend_d{d}", f"finish_d{d}"}) - names:
            fail(f"no entry point {sorted(missing)}")
    if text.count("kernel void") != len(found):
        fail("an entry point does not say how many threads it takes")
    code = re.sub(r"//.*", "", path.read_text(encoding="utf-8"))
    if words := re.findall(r"\b(double|long long|goto|new|delete|try|throw|virtual|static_cast|std)\b", code):
        fail(f"words that Metal does not have: {sorted(set(words))}")
    print(f"{len(found)} entry points; threadgroup memory up to {largest} bytes")


def run_tests(program: str, *names: str, **environment: str) -> subprocess.CompletedProcess:
    flags = [f"--gtest_filter={':'.join(names)}", "--gtest_fail_fast"]
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", **environment}
    return subprocess.run([program, *flags], env=environment, text=True, capture_output=True, timeout=300)


def check_barriers(path: Path, program: str) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    barriers = [number for number, line in enumerate(lines, 1) if re.match(r"\s+gpu_(simd_)?barrier\(\);", line)]
    if run_tests(program, "MetalBarriers.*").returncode:
        fail("the tests fail with all barriers in place")

    def survives(mutation: tuple[str, int]) -> bool:
        return run_tests(program, "MetalBarriers.*", **{mutation[0]: str(mutation[1])}).returncode == 0

    mutations = [(how, line) for line in barriers for how in ("HALFBYTE_SKIP_BARRIER", "HALFBYTE_SPLIT_BARRIER")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        missed = [m for m, alive in zip(mutations, pool.map(survives, mutations), strict=True) if alive]
    if missed:
        fail("not noticed: " + "; ".join(f"{how} {line}: {lines[line - 1].strip()}" for how, line in missed))
    print(f"{len(barriers)} barriers: tests fail without each, and where only half of the threads reach it")


def check_coverage(path: Path, program: str, objects: Path) -> None:
    for old in objects.glob("*.gcda"):
        old.unlink()
    if run_tests(program, "Metal*").returncode:
        fail("the tests fail")
    hits: dict[int, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        (data,) = objects.glob("kernels*.gcda")
        subprocess.run(["gcov", "--json-format", str(data)], cwd=folder, check=True, capture_output=True)
        for report in Path(folder).glob("*.gcov.json.gz"):
            for file in json.loads(gzip.decompress(report.read_bytes()))["files"]:
                if Path(file["file"]).name == path.name:
                    for line in file["lines"]:
                        hits[line["line_number"]] = hits.get(line["line_number"], 0) + line["count"]
    if not hits:
        fail("gcov knows no line of the Metal text")
    lines = path.read_text(encoding="utf-8").splitlines()
    missed = [number for number, count in sorted(hits.items()) if not count]
    share = 1 - len(missed) / len(hits)
    print(f"{share:.1%} of {len(hits)} lines run", *(f"{n}: {lines[n - 1]}" for n in missed), sep="\n")
    if share < LEAST_COVERAGE:
        fail(f"less than {LEAST_COVERAGE:.0%}")


def main() -> None:
    match sys.argv[1:]:
        case ["types", text]:
            check_types(Path(text))
        case ["limits", text]:
            check_limits(Path(text))
        case ["barriers", text, program]:
            check_barriers(Path(text), program)
        case ["coverage", text, program, objects]:
            check_coverage(Path(text), program, Path(objects))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
