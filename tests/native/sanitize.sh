#!/bin/sh
# Build the extension with AddressSanitizer and UndefinedBehaviorSanitizer in a scratch copy, and run the native tests on
# it. Usage: tests/native/sanitize.sh [python [pytest arguments]]; the interpreter has torch, pytest and setuptools.
set -eu

root=$(cd "$(dirname "$0")/../.." && pwd)
python=$(command -v "${1:-python}")
case $python in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac
[ $# -eq 0 ] || shift
compiler=${CXX:-c++}
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT

cd "$root"
tar cf - --exclude='*.so' --exclude=__pycache__ setup.py pyproject.toml README.md LICENSE csrc rhythm_kernels tests | tar xf - -C "$copy"
cd "$copy"

flags="-g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
RHYTHM_CUDA=0 CFLAGS="$flags" CXXFLAGS="$flags" LDFLAGS="-fsanitize=address,undefined" \
    "$python" setup.py -q build_ext --inplace --build-temp "$copy/build"

# libstdc++ goes along: without it every C++ exception would abort. --capture=sys lets the report through.
LD_PRELOAD="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$copy" \
    "$python" -m pytest -q --capture=sys -p no:cacheprovider tests/native/test_native_passes.py tests/test_credit.py "$@"
