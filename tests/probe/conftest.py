"""What of these tests needs an environment of its own."""

from __future__ import annotations

from importlib.util import find_spec

# The real flash-attn: `FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE FLASH_ATTENTION_FORCE_BUILD=TRUE
# pip install --no-build-isolation flash-attn==2.8.3 einops` is enough for the interpreted run.
collect_ignore = [] if find_spec("flash_attn") else ["test_probe_flash_package.py"]
