#!/usr/bin/env bash
# Installs a build into a scratch prefix, builds examples/attend.c as a separate project against it, and runs it.
# usage: installed_package_test.sh SOURCE_DIR BUILD_DIR
set -euo pipefail
source_dir=$1 build_dir=$2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cmake --install "$build_dir" --prefix "$scratch/prefix" >/dev/null
mkdir "$scratch/user"
cp "$source_dir/examples/attend.c" "$scratch/user/"
cat >"$scratch/user/CMakeLists.txt" <<'END'
cmake_minimum_required(VERSION 3.20)
project(user LANGUAGES C CXX)
find_package(halfbyte 0.1 REQUIRED)
add_executable(attend attend.c)
target_compile_options(attend PRIVATE -std=c11 -Wall -Wextra -Werror)
target_link_libraries(attend PRIVATE halfbyte::halfbyte m)
set_target_properties(attend PROPERTIES LINKER_LANGUAGE CXX)
END
cmake -S "$scratch/user" -B "$scratch/user/build" -DCMAKE_PREFIX_PATH="$scratch/prefix" >/dev/null
cmake --build "$scratch/user/build" >/dev/null
"$scratch/user/build/attend"
