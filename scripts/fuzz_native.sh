#!/usr/bin/env bash
# Fuzz the native decoders with damaged payloads, under AddressSanitizer and UndefinedBehaviorSanitizer.
#   scripts/fuzz_native.sh [cases, default 10 million] [seed]
# Needs g++ or clang++ (CXX, CXXFLAGS) with both sanitizers. Exit status 0: nothing was found.
set -euo pipefail
cpu="$(cd "$(dirname "$0")/../kernels/cpu" && pwd)"
build="$(mktemp -d)"
trap 'rm -rf "$build"' EXIT
flags=(-std=c++17 -O2 -g -ffp-contract=off -fno-math-errno -fno-trapping-math -pthread
  -fsanitize=address,undefined -fno-sanitize-recover=all -Wall -Wextra ${CXXFLAGS:-})
level() { "${CXX:-g++}" "${flags[@]}" -DPSYCHE_LEVEL="$1" "${@:2}" -c "$cpu/level.cpp" -o "$build/$1.o"; }
level baseline
if [ "$(uname -m)" = x86_64 ]; then
  level avx2 -mavx2 -mbmi -mpopcnt
  level avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mbmi -mpopcnt
  flags+=(-DPSYCHE_X86)
fi
"${CXX:-g++}" "${flags[@]}" "$cpu"/{fuzz,operations,topk2e}.cpp "$build"/*.o -o "$build/fuzz"
"$build/fuzz" "$@"
