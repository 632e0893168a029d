"""What an entry was measured on: device, versions, threads, commit."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def commit() -> str:
    """Abbreviated hash of HEAD, with `-dirty` where tracked files differ; "unknown" outside of a repository."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if not head:
        return os.environ.get("RHYTHM_COMMIT", "unknown")
    return head + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def _triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return triton.__version__


def environment(device: torch.device) -> dict[str, Any]:
    """What every entry carries."""
    from rhythm_kernels import build_info

    return {
        "device": device_name(device),
        "device_type": device.type,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton(),
        "triton_interpreted": os.environ.get("TRITON_INTERPRET") == "1",
        "triton_tiles": os.environ.get("RHYTHM_TILES"),  # tuned tiles, where they were asked for
        "cuda": torch.version.cuda,
        "native": build_info(),
        "commit": commit(),
    }
