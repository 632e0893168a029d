#!/usr/bin/env bash
# The tests under other versions, each in an environment of its own (.venv-NAME, kept for the next time).
#   bash tests/matrix.sh [PYTHON [NAME ...]]
# Names: those of `all` below; CONTRIBUTING.md says what each is for.
# Prints one line a row at the end and fails if one failed. PYTHON_GPU and PYTHON_AXOLOTL name the Python 3.12 of two rows.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${1:-python3}
shift || true
names=("$@")
all=(torch-oldest trl-oldest trl-middle trl-contract axolotl ms-swift areal sources triton-3.6 triton-3.9 peers abi
  gpu-machine)
[ ${#names[@]} -gt 0 ] || names=("${all[@]}")
torch=${TORCH:-torch==2.13.0}
extras="[train,tasks,test]"
export OMP_NUM_THREADS=1

# environment NAME PACKAGE... : the package with its extras, then the versions that make the row.
environment() {
  local bin=.venv-$1/bin
  [ -x "$bin/python" ] || "$python" -m venv ".venv-$1"
  # shellcheck disable=SC2086  # TORCH may carry options
  "$bin/python" -m pip install --quiet --disable-pip-version-check $torch "setuptools>=77" wheel ninja &&
    "$bin/python" -m pip install --quiet --disable-pip-version-check --no-build-isolation -e ".$extras" &&
    "$bin/python" -m pip install --quiet --disable-pip-version-check "${@:2}"
}

row() {
  case $1 in
    torch-oldest) # its CUDA build pins a Triton, the test extra another one
      torch="torch==2.10.0" extras="" environment "$1" "numpy<2.4" pytest pytest-xdist pytest-benchmark hypothesis \
        "transformers>=5.5" &&
        ".venv-$1/bin/python" -m pytest -q -n auto tests/test_*.py tests/native/test_native_passes.py
      ;;
    trl-oldest)
      environment "$1" "trl==1.0.0" "transformers==5.5.4" requests &&
        ".venv-$1/bin/python" -m pytest -q -n auto tests/integrations tests/probe
      ;;
    trl-middle) # the last that is unlike the newest in its loss; then the one that is unlike all in its passes
      environment "$1" "trl==1.9.2" "transformers==5.14.1" requests &&
        ".venv-$1/bin/python" -m pytest -q -n auto tests/integrations &&
        ".venv-$1/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "trl==1.14.2" &&
        ".venv-$1/bin/python" -m pytest -q -n auto tests/integrations
      ;;
    trl-contract) # every release that is allowed: its wheel is read, nothing of it is installed
      { [ -x ".venv-$1/bin/python" ] || "$python" -m venv ".venv-$1"; } &&
        ".venv-$1/bin/python" -m pip install --quiet --disable-pip-version-check packaging &&
        ".venv-$1/bin/python" -m tests.integrations.every_trl ".venv-$1/wheels"
      ;;
    axolotl) # needs Python 3.12; without what it needs on a GPU: its trainer and its command run without
      python=${PYTHON_AXOLOTL:-python3.12} extras="" environment "$1" trl==1.14.1 transformers==5.20.1 \
        accelerate==1.15.0 datasets==5.0.1 peft==0.21.2 pydantic addict fire PyYAML colorama typer python-dotenv scipy \
        einops requests numba "kernels<0.18" evaluate==0.4.1 fastcore schedulefree==1.4.1 axolotl-contribs-lgpl==0.0.7 \
        axolotl-contribs-mit==0.0.6 posthog==6.7.11 art zstandard tensorboard sentencepiece langdetect \
        nvidia-ml-py==12.560.30 hf_transfer torchao wandb pytest hypothesis &&
        ".venv-$1/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps bitsandbytes==0.50.2 \
          axolotl==0.21.0 &&
        AXOLOTL=required ".venv-$1/bin/python" -m pytest -q tests/integrations/test_axolotl.py
      ;;
    ms-swift) # with the TRL and the transformers that it asks for; msgspec it imports and does not ask for
      extras="" environment "$1" "ms-swift==4.6.0" msgspec pytest &&
        ".venv-$1/bin/python" -m pytest -q tests/integrations/ms_swift_{run,command}.py
      ;;
    triton-3.6)
      environment "$1" "triton==3.6.0" && ".venv-$1/bin/python" -m pytest -q -n auto tests/triton
      ;;
    triton-3.9)
      environment "$1" "triton==3.9.0" && ".venv-$1/bin/python" -m pytest -q -n auto tests/triton
      ;;
    peers) # flash-attn without its CUDA kernels: its Triton backend is interpreted
      environment "$1" "triton==3.8.0" "flash-colreduce==0.2.2" einops &&
        FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE FLASH_ATTENTION_FORCE_BUILD=TRUE ".venv-$1/bin/python" -m pip install \
          --quiet --disable-pip-version-check --no-build-isolation --no-deps "flash-attn==2.8.3" &&
        PEERS=required ".venv-$1/bin/python" -m pytest -q -n auto tests/peers tests/probe/test_probe_flash_package.py
      ;;
    areal) # without what it needs for serving and on a GPU: its trainer's code runs without
      environment "$1" aiofiles aiohttp colorlog einops flask "hydra-core==1.4.0.dev1" lark numba "omegaconf==2.4.0.dev2" \
        openai orjson pillow pybase64 ray swanlab tabulate tenacity tensorboardX torchdata trackio uvloop wandb \
        "transformers==5.3.0" &&
        ".venv-$1/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "areal==1.0.4" &&
        PEERS=required ".venv-$1/bin/python" -m pytest -q tests/integrations/pages/test_areal.py \
          tests/integrations/pages/test_areal_package.py
      ;;
    abi) # one wheel for every Python and torch: built with $torch, run on the oldest that it is for
      local oldest=2.10.0 pip="-m pip install --quiet --disable-pip-version-check"
      rm -rf .venv-abi-wheels
      # shellcheck disable=SC2086
      { [ -x .venv-abi-build/bin/python ] || "$python" -m venv .venv-abi-build; } &&
        { [ -x .venv-abi/bin/python ] || "$python" -m venv .venv-abi; } &&
        .venv-abi-build/bin/python $pip $torch "setuptools>=77" wheel &&
        .venv-abi-build/bin/python -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps \
          --wheel-dir .venv-abi-wheels . &&
        ls .venv-abi-wheels/*-cp310-abi3-*.whl &&
        .venv-abi/bin/python $pip "torch==$oldest" numpy &&
        .venv-abi/bin/python $pip --force-reinstall --no-deps .venv-abi-wheels/*-cp310-abi3-*.whl &&
        .venv-abi/bin/python tests/native/self_check.py "$oldest"
      ;;
    gpu-machine) # the software beside the GPU that figures come from: both calls of docs/gpu.md, rehearsed
      python=${PYTHON_GPU:-python3.12} torch="torch==2.11.0" extras="" environment "$1" "triton==3.6.0" \
        "numpy==2.5.2" "transformers==5.17.0" "trl==1.16.0" "datasets<5" "flash-colreduce==0.2.2" accelerate pyyaml \
        pytest pytest-xdist pytest-benchmark hypothesis matplotlib &&
        ".venv-$1/bin/python" -m pytest -q -n auto tests/probe/test_probe_waiting.py tests/test_tensor_cache.py tests/gpu &&
        ".venv-$1/bin/python" -m benchmarks.gpu right --rehearse --out ".venv-$1/results" &&
        ".venv-$1/bin/python" -m benchmarks.gpu fast --rehearse --out ".venv-$1/results"
      ;;
    sources) # what the pages of docs/trainers use of packages that are not installed: read, not run
      { [ -x .venv-sources/bin/python ] || "$python" -m venv .venv-sources; } &&
        .venv-sources/bin/python -m pip install --quiet --disable-pip-version-check "setuptools>=77" wheel &&
        .venv-sources/bin/python tests/integrations/pages/names.py .venv-sources/sources
      ;;
    *)
      echo "unknown row: $1" >&2
      return 2
      ;;
  esac
}

failed=0
summary=()
for name in "${names[@]}"; do
  echo "== $name"
  if row "$name"; then summary+=("passed  $name"); else
    summary+=("FAILED  $name")
    failed=1
  fi
done
printf '%s\n' "${summary[@]}"
exit $failed
