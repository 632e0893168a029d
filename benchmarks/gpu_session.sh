#!/usr/bin/env bash
# All that needs a GPU, in one call of under ten minutes: build, GPU tests, compute-sanitizer, benchmarks.
#
#   bash benchmarks/gpu_session.sh [--rehearse] [--steps about,build,test,...] [--seconds N]
#
# No step stops the next: session.json holds each one's exit status and seconds (124: it ran out of its time). Written
# to $OUT, or to benchmarks/results/session where OUT is unset: session.json, session.log, rows.json, junit.xml, and
# tiles.json where the Triton tiles are tuned, which takes a call of its own: --steps tune.
# Where .git does not travel, set RHYTHM_COMMIT to the commit that rows shall name.
#
# What does not fit one call goes into two, on a machine that keeps its files between them:
#   --steps about,build,test,quick and --steps sanitize,bands,streams,probe,report
#
# --steps     which, in their order; default all but tune: about build test quick sanitize bands streams probe tune
#             report
# --seconds   for everything (570); each step gets its own limit, or what is left
# --rehearse  every step on the CPU with tiny shapes, Triton interpreted: checks this script, measures nothing
set -uo pipefail
cd "$(dirname "$0")/.."

rehearse=0 seconds=570 steps=about,build,test,quick,sanitize,bands,streams,probe,report
while [ $# -gt 0 ]; do
  case $1 in
    --rehearse) rehearse=1 ;;
    --steps) steps=$2 && shift ;;
    --seconds) seconds=$2 && shift ;;
    *) echo "unknown argument $1" >&2 && exit 2 ;;
  esac
  shift
done

python=${PYTHON:-python3}
out=${OUT:-benchmarks/results/session}
mkdir -p "$out"
out=$(cd "$out" && pwd)
log=$out/session.log
rows=$out/rows.json
: >"$log"
rm -f "$rows" "$out/session.json" "$out/junit.xml" "$out/tiles.json"
export PYTHONUNBUFFERED=1 PYTHONPATH=${PYTHONPATH:-}:$PWD
started=$SECONDS
results=()
failed=0

if [ $rehearse = 1 ]; then
  export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
  device=(--device cpu --profile tiny)
else
  device=(--device cuda)
fi

# step NAME LIMIT COMMAND...: run it for at most LIMIT seconds, keep its status, go on.
step() {
  local name=$1 limit=$2 left rc begin=$SECONDS
  shift 2
  case ",$steps," in *",$name,"*) ;; *) return 0 ;; esac
  left=$((seconds - (SECONDS - started)))
  if [ $left -lt 5 ]; then
    results+=("{\"step\": \"$name\", \"rc\": null, \"seconds\": 0}")
    failed=1
    summary
    return 0
  fi
  [ "$limit" -gt $left ] && limit=$left
  printf '\n===== %s: %s\n' "$name" "$*" >>"$log"
  timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1
  rc=$?
  [ $rc = 0 ] || failed=1
  results+=("{\"step\": \"$name\", \"rc\": $rc, \"seconds\": $((SECONDS - begin))}")
  printf '%-9s rc %-4s %4s s\n' "$name" "$rc" $((SECONDS - begin))
  summary
}

summary() {
  local IFS=,
  printf '{"rehearsal": %s, "steps": [%s]}\n' "$([ $rehearse = 1 ] && echo true || echo false)" "${results[*]}" \
    >"$out/session.json"
}

bench() { # bench STEP LIMIT ARGUMENTS...
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" "$python" -m benchmarks "${device[@]}" --save "$rows" "$@"
}

about() {
  nvidia-smi || true
  "$python" -c 'import json, torch; from benchmarks.machine import environment
print(json.dumps(environment(torch.device("cuda" if torch.cuda.is_available() else "cpu")), indent=1))'
}
export -f about
export python
step about 60 bash -c about

# The compiled kernels, the CUDA part where nvcc is; what is missing is then skipped or unavailable, with its reason. An
# extension that came along with its CUDA part is kept on a machine without nvcc.
build() {
  if [ -n "${CUDA_HOME:-}" ] || command -v nvcc || ! "$python" -c 'from rhythm_kernels import build_info
raise SystemExit(not build_info().get("cuda", {"built": False})["built"])'; then
    "$python" setup.py build_ext --inplace || return
  fi
  "$python" -c 'import rhythm_kernels as rk; print(rk.build_info(), rk.backends())'
}
export -f build
if [ $rehearse = 1 ]; then
  step build 60 "$python" setup.py --version
else
  step build 180 bash -c build
fi

workers=()
if [ $rehearse = 0 ] && "$python" -c 'import xdist' 2>/dev/null; then
  workers=(-n 8)
fi
step test 200 "$python" -m pytest -m gpu tests -q -p no:cacheprovider --continue-on-collection-errors \
  "${workers[@]}" --junitxml "$out/junit.xml"
[ $rehearse = 1 ] && step test 60 "$python" -m pytest tests/gpu -k rehearsal -q -p no:cacheprovider

if [ $rehearse = 1 ]; then
  bench quick 60 --suite credit
else
  bench quick 150 --profile quick
fi

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
if [ $rehearse = 1 ]; then
  step sanitize 60 "$python" -m tests.gpu.sanitized
elif [ -n "$sanitizer" ]; then
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck; do
    step sanitize 60 "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 20 "$python" -m tests.gpu.sanitized
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
else
  step sanitize 5 bash -c 'echo "no compute-sanitizer here"; exit 127'
fi

if [ $rehearse = 1 ]; then
  bench bands 60 --suite band_rows --suite band_columns
  bench streams 60 --suite row_stats --suite column_stats --suite column_moments --suite attention
  bench probe 60 --suite probe
else
  # FlexAttention, which is compiled for every shape, was met in `quick`.
  bench bands 120 --suite band_rows --suite band_columns --suite credit --seconds 4 --without FlexAttention
  bench streams 150 --suite row_stats --suite column_stats --suite column_moments --suite attention --seconds 4 \
    --without FlexAttention
  bench probe 120 --suite probe --seconds 8
fi

tune() { # tune LIMIT ARGUMENTS...
  local limit=$1
  shift
  step tune "$limit" "$python" -m rhythm_kernels.triton.tune --save "$out/tiles.json" "$@"
}
if [ $rehearse = 1 ]; then
  tune 60 --kernel band_rows --candidates 1 --length 40 --head-size 16 --heads 2 --kv-heads 1
else
  left=$((seconds - (SECONDS - started) - 30)) # a candidate that is begun is finished
  tune 560 --seconds $((left > 10 ? left : 10))
fi

step report 60 "$python" -m benchmarks report "$rows"
[ -f "$rows" ] && "$python" -m benchmarks report "$rows" 2>/dev/null | sed -n '/^## Targets/,/^## [^T]/p' | sed '$d'
printf '%s s in all; see %s\n' $((SECONDS - started)) "$out"
exit $failed
