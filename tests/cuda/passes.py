"""The CUDA passes on CPU tensors: the emulated `csrc/cuda` sources with the signatures that every backend has."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from rhythm_kernels.rule import Rule

from .emulated import Emulated

LAYOUT = Path(__file__).resolve().parent / "kernels" / "layout.cu"
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p


class ScoreRule(ctypes.Structure):
    """`rhythm::ScoreRule` of csrc/include/rhythm/inputs.h."""

    _fields_ = (("scale", ctypes.c_float), ("softcap", ctypes.c_float), ("window_left", _INT), ("sinks", _POINTER),
                ("slopes", _POINTER), ("slope_stride", _INT))  # fmt: skip


class CudaInputs(ctypes.Structure):
    """`rhythm::CudaInputs` of csrc/include/rhythm/cuda.h, its base `Inputs` (inputs.h) first."""

    _fields_ = (
        ("dtype", ctypes.c_int), ("q", _POINTER), ("k", _POINTER),
        ("q_batch", _INT), ("q_token", _INT), ("q_head", _INT), ("k_batch", _INT), ("k_token", _INT), ("k_head", _INT),
        ("head_dim", _INT), ("batch", _INT), ("tokens", _INT),
        ("lse", _POINTER), ("lse_batch", _INT), ("lse_head", _INT), ("lse_token", _INT),
        ("seqs", _POINTER), ("n_seqs", _INT), ("max_seqlen", _INT), ("heads", _POINTER), ("n_heads", _INT),
        ("score", ScoreRule), ("per_head", ctypes.c_bool), ("window", _INT), ("lo", _INT), ("hi", _INT),
        ("out", _POINTER), ("queries_per_kv", _INT), ("out_batch", _INT), ("out_head", _INT),
    )  # fmt: skip


def check_layout(library: Emulated) -> None:
    """That a library built with `LAYOUT` has the struct mirrored here: a field out of place is read as another."""
    sizes = (ctypes.c_int * 3)()
    library.library.cuda_inputs_layout(sizes)
    mirrored = (ctypes.sizeof(CudaInputs), CudaInputs.window.offset, CudaInputs.out_head.offset)
    if tuple(sizes) != mirrored:
        raise TypeError(
            f"CudaInputs of csrc has (size, offset of window, offset of out_head) {tuple(sizes)}, its mirror in "
            f"{__file__} has {mirrored}: mend the fields there, which csrc/include/rhythm/cuda.h and inputs.h list"
        )


class Passes:
    """`band_rows` and `band_columns` of one library, built with `LAYOUT`."""

    def __init__(self, library: Emulated) -> None:
        check_layout(library)
        self.library = library

    def band_rows(self, q: Tensor, k: Tensor, lse: Tensor, rule: Rule, window: int, per_head: bool) -> Tensor:
        return self._band("rhythm_cuda_band_rows", q, k, lse, rule, per_head, window=window)

    def band_columns(self, q: Tensor, k: Tensor, lse: Tensor, rule: Rule, lo: int, hi: int, per_head: bool) -> Tensor:
        return self._band("rhythm_cuda_band_columns", q, k, lse, rule, per_head, lo=lo, hi=hi)

    def _band(
        self, name: str, q: Tensor, k: Tensor, lse: Tensor, rule: Rule, per_head: bool, **extra: int
    ) -> Tensor:  # fmt: skip
        seqs, heads, max_seqlen, scale, softcap, window_left, sinks, slopes = rule
        batch, tokens, n_heads, head_dim = q.shape
        shape = (batch, heads.shape[0], tokens) if per_head else (batch, tokens)
        nothing = seqs.shape[0] == 0 or max_seqlen == 0  # then nothing is launched
        out = torch.full(shape, 0.0 if nothing else float("nan"))
        inputs = CudaInputs(
            dtype=_DTYPES[q.dtype], q=q.data_ptr(), k=k.data_ptr(),
            q_batch=q.stride(0), q_token=q.stride(1), q_head=q.stride(2),
            k_batch=k.stride(0), k_token=k.stride(1), k_head=k.stride(2),
            head_dim=head_dim, batch=batch, tokens=tokens,
            lse=lse.data_ptr(), lse_batch=lse.stride(0), lse_head=lse.stride(1), lse_token=lse.stride(2),
            seqs=seqs.data_ptr(), n_seqs=seqs.shape[0], max_seqlen=max_seqlen,
            heads=heads.data_ptr(), n_heads=heads.shape[0], queries_per_kv=n_heads // k.shape[2],
            score=ScoreRule(
                scale=scale, softcap=softcap, window_left=tokens if window_left < 0 else window_left,
                sinks=None if sinks is None else sinks.data_ptr(),
                slopes=None if slopes is None else slopes.data_ptr(),
                slope_stride=0 if slopes is None or slopes.shape[0] == 1 else n_heads,
            ),
            per_head=per_head, out=out.data_ptr(), out_batch=out.stride(0), out_head=out.stride(1) if per_head else 0,
            **extra,
        )  # fmt: skip
        self.library.call(name, ctypes.byref(inputs), None)
        return out
