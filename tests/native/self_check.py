"""What an installed package must do wherever it is installed: `python self_check.py [the version torch must have]`.

Every compiled pass and the credit against the dense definitions; prints the backends' reasons and what was built.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import sysconfig

import torch

import rhythm_kernels as rk
from rhythm_kernels import reference


def main(wanted: str) -> None:
    assert torch.__version__.startswith(wanted), f"torch is {torch.__version__}, not {wanted}"
    assert rk.__file__.startswith(sysconfig.get_path("purelib")), f"not the installed package: {rk.__file__}"
    q, k = torch.randn(2, 50, 4, 16), torch.randn(2, 50, 2, 16)
    dense = q.double(), k.double()
    lse = rk.attention_lse(q, k)
    for got, want in (
        (lse, reference.attention_lse(*dense)),
        (rk.waad(q, k, lse), reference.waad(*dense)),
        (rk.fai(q, k, lse), reference.fai(*dense)),
        (rk.span(q, k), reference.span(*dense)),
        (rk.column_moments(q, k, lse).mean, reference.column_moments(*dense).mean),
    ):
        assert (got - want).abs().max() < 1e-4 * max(1, float(want.abs().max()))
    waad, fai = torch.rand(2, 3, 50)
    assert torch.equal(rk.rhythm_credit(waad, fai, fai > 0.1), reference.rhythm_credit(waad, fai, fai > 0.1))
    info = rk.build_info()
    if info["available"]:
        built = hasattr(torch.ops.rhythm_kernels_native, "cuda_credit")
        assert built == info["cuda"]["built"]
        for name in ("band_rows", "band_columns", "credit") if built else ():
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"rhythm_kernels_native::cuda_{name}", "CUDA")
    if torch.version.cuda is not None:  # as csrc/bindings_cuda.cpp looks for the caller's stream
        ctypes.CDLL("libtorch_cuda.so", mode=os.RTLD_LAZY | os.RTLD_NOLOAD).aoti_torch_get_current_cuda_stream  # noqa: B018
    print(json.dumps({"torch": torch.__version__, "backends": rk.backends(), "built": info}))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
