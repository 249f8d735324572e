#!/bin/sh
# Checks that the machine has what a build needs, and installs it on Debian-like machines when run as root.
# usage: tools/check_system.sh [--tests|--metal|--bench|--neon]
# --tests: GoogleTest and Valgrind too; --metal: GoogleTest and clang, which checks Metal's address spaces; --bench: Google Benchmark; --neon: a compiler and an emulator for 64-bit Arm.
# Environment: CXX, PYTHON
set -eu

python=${PYTHON:-python3}
for_what=${1:-}

compiler() {
    for name in ${CXX:-c++ g++ clang++}; do
        if command -v "$name" >/dev/null 2>&1; then echo "$name"; return; fi
    done
}

# Asks the compiler itself: a name in PATH says neither which compiler it is nor that its headers are there.
compiles() { printf '%s\n' "$1" | "$(compiler)" -std=c++20 -x c++ -fsyntax-only - >/dev/null 2>&1; }
has_compiler() { [ -n "$(compiler)" ] && compiles '#include <span>
#if defined(__clang__) ? __clang_major__ < 14 : __GNUC__ < 12
#error too old
#endif'; }
has_venv() { "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; }
has_headers() {
    "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' >/dev/null 2>&1
}
has_gtest() { compiles '#include <gtest/gtest.h>'; }
has_benchmark() { compiles '#include <benchmark/benchmark.h>'; }

find_missing() {
    missing=""
    has_compiler || missing="$missing g++"
    command -v "$python" >/dev/null 2>&1 || missing="$missing python3"
    has_venv || missing="$missing python3-venv"
    has_headers || missing="$missing python3-dev"
    command -v git >/dev/null 2>&1 || missing="$missing git"
    if [ "$for_what" = --tests ] && ! has_gtest; then missing="$missing libgtest-dev"; fi
    if [ "$for_what" = --tests ] && ! command -v valgrind >/dev/null 2>&1; then missing="$missing valgrind"; fi
    if [ "$for_what" = --metal ]; then
        has_gtest || missing="$missing libgtest-dev"
        command -v clang >/dev/null 2>&1 || missing="$missing clang"
    fi
    if [ "$for_what" = --neon ]; then
        command -v aarch64-linux-gnu-g++ >/dev/null 2>&1 || missing="$missing g++-aarch64-linux-gnu"
        command -v qemu-aarch64 >/dev/null 2>&1 || missing="$missing qemu-user"
        [ -f /usr/src/googletest/CMakeLists.txt ] || missing="$missing googletest"
    fi
    if [ "$for_what" = --bench ] && ! has_benchmark; then missing="$missing libbenchmark-dev"; fi
}

find_missing
if [ -n "$missing" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing from Debian packages:$missing"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq && apt-get install -y -qq --no-install-recommends $missing >/dev/null
    find_missing
fi
if [ -n "$missing" ]; then
    echo "error: this machine lacks:$missing (Debian package names; g++ stands for g++ >= 12 or clang >= 14)." >&2
    echo "       Install them, for example: sudo apt-get install$missing" >&2
    exit 1
fi
"$python" -c 'import sys
sys.exit(0 if sys.version_info >= (3, 11) else "error: requirements.lock pins packages for Python >= 3.11, and "
         f"{sys.executable} is {sys.version.split()[0]}: set PYTHON=python3.11 (pip install . works from 3.10 on)")'
