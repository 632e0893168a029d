"""Every option crossed: cases that hypothesis draws, from seeds that are always the same, against the NumPy oracle.

The summary of a run says how many cases each backend had and the share of each trait. A failing case is printed,
shrunk, as the `Case` that it is; `hold(Case(...), backend)` repeats it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers

import rhythm_kernels as rk
from rhythm_kernels.backend.tiled_torch import passes, tiles
from tests.backends import device_of
from tests.fuzz import credit
from tests.fuzz.cases import Case, cases
from tests.fuzz.credit import CreditCase, credit_cases
from tests.fuzz.holding import compare, hold
from tests.fuzz.tally import Tally

ASKED = (
    "strided", "packed", "padded", "windowed", "with sinks", "ALiBi", "softcapped", "head subset", "response_start",
    "grouped heads", "per head", "lse given", "16-bit", "extreme values", "own scale", "NaN in padding",
    "an empty sequence",
)  # fmt: skip
ASKED_OF_CREDIT = ("holes", "ties", "bottom", "thresholds given", "coupled", "strided", "not float32")

# Backend -> cases in the default tests; then the long ones, as runs of so many cases, each of another seed.
QUICK = {"cpu": 60, "torch": 60, "triton": 8, "reference": 30}
LONG = {"cpu": (4, 500), "torch": (4, 500), "triton": (2, 150), "reference": (1, 500)}
RUNS = [pytest.param(backend, 0, n, id=backend) for backend, n in QUICK.items()] + [
    pytest.param(backend, 1 + i, n, id=f"{backend}-{i}", marks=pytest.mark.long)
    for backend, (runs, n) in LONG.items()
    for i in range(runs)
]


@contextmanager
def by_seed_alone() -> Iterator[None]:
    """Draws that no other code decides: hypothesis also draws numbers that stand in the modules which are loaded."""
    if not hasattr(providers, "_get_local_constants"):  # of a release that does not
        yield
        return
    with patch.object(providers, "_get_local_constants", providers.Constants):
        providers.CONSTANTS_CACHE.cache.clear()
        try:
            yield
        finally:
            providers.CONSTANTS_CACHE.cache.clear()


def fuzz(strategy: st.SearchStrategy[Any], number: int, run: int, check: Callable[[Any], None]) -> Tally:
    """Check `number` cases, the same ones for the same `run`."""
    tally = Tally()

    @seed(run)
    @settings(
        max_examples=number,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def each(case: Any) -> None:
        tally.add(case.traits)
        check(case)

    with by_seed_alone():
        each()
    return tally


def small_tiles(patch: pytest.MonkeyPatch) -> None:
    """Of the torch backend, 32 keys by 16 rows: the tiles that it has would each hold nearly every case whole."""
    patch.setattr(tiles, "_TILE_ELEMENTS", 1)
    for module in (passes, importlib.import_module("rhythm_kernels.backend.tiled_torch.attention")):
        patch.setattr(module, "KEY_TILE", 32)


@pytest.mark.parametrize(("backend", "run", "number"), RUNS)
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NumPy's, where the interpreter divides by zero
def test_measures_and_attention(
    backend: str, run: int, number: int, record_property: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if rk.backends()[backend]:
        pytest.skip(rk.backends()[backend])
    if run % 2 == 0:
        small_tiles(monkeypatch)
    small = backend == "triton"
    longest = 90 if small else 100 if run == 0 else 300
    tally = fuzz(cases(longest, small), number, run, lambda case: hold(case, backend, device_of(backend)))
    record_property(*tally.as_property(backend))
    tally.hold(number, ASKED if run > 0 else ())


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize(("run", "number"), [(0, 60), pytest.param(1, 2000, marks=pytest.mark.long)])
def test_credit(backend: str, run: int, number: int, record_property: Callable[..., None]) -> None:
    if rk.backends()[backend]:
        pytest.skip(rk.backends()[backend])

    def check(case: CreditCase) -> None:
        waad, fai, entropy, mask = case.tensors()
        got = rk.rhythm_credit(waad, fai, mask, entropy=entropy, backend=backend, **case.options)
        want = credit.gamma(case, waad, fai, entropy, mask)
        compare("gamma", got, want, 1e-6 * np.abs(want))
        shape = tuple(mask.shape) if case.per_token else mask.shape[:1]
        advantages = torch.randn(shape, generator=torch.Generator().manual_seed(case.seed)).round(decimals=1)
        found = rk.shape_advantages(advantages, got, sign=case.sign)
        want = credit.shaped(advantages, got.double().numpy(), case.sign)
        compare("the shaped advantage", found, want, 1e-6 * np.abs(want))

    tally = fuzz(credit_cases(), number, run, check)
    record_property(*tally.as_property(f"credit {backend}"))
    tally.hold(number, ASKED_OF_CREDIT if run > 0 else ())


def test_a_case_is_its_seed() -> None:
    """What hypothesis prints is all that a case is made of."""
    from tests.fuzz.cases import make

    found: list[Case] = []
    fuzz(cases(30), 5, 3, found.append)
    for case in found:
        again = eval(repr(case), {"Case": Case, "inf": float("inf")})
        for name, x in make(case).given.items():
            assert torch.equal(x.nan_to_num(), make(again).given[name].nan_to_num())


def test_a_seed_decides_all_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever other modules hold."""
    if not hasattr(providers, "_get_local_constants"):
        pytest.skip("this hypothesis draws from no modules")
    found: list[list[Case]] = []
    for held in ([], [7, 11, 13, 17]):
        monkeypatch.setattr(providers, "_local_constants", providers.Constants(integers=providers.SortedSet(held)))
        found.append([])
        fuzz(cases(90), 40, 3, found[-1].append)
    assert found[0] == found[1]
