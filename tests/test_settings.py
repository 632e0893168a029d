"""`RhythmSettings`: the method's defaults, in one place, and what each setting may be."""

from __future__ import annotations

import dataclasses
import inspect
import math
import subprocess
import sys

import pytest

import rhythm_kernels as rk
from rhythm_kernels import reference
from rhythm_kernels.probe.calibration import Calibration
from rhythm_kernels.settings import RhythmSettings

DEFAULTS = {  # of the method
    "mode": "coupled",
    "gamma_amp": 1.5,
    "top": 0.4,
    "alpha": 0.5,
    "neighbors": 3,
    "window": 10,
    "horizon": (10, 100),
    "layers": "middle5",
    "head_quantile": 0.3,
    "groups": None,
    "regroup_steps": 0,
    "sign": "both",
}


def test_defaults_are_those_of_the_method():
    assert dataclasses.asdict(RhythmSettings()) == DEFAULTS


@pytest.mark.parametrize(
    "function",
    [
        *(rk.waad, rk.fai, rk.attention_with_rhythm, rk.rhythm_credit, rk.shape_advantages, rk.head_groups),
        *(rk.RhythmProbe, Calibration, reference.waad, reference.fai, reference.rhythm_credit),
    ],
)
def test_functions_have_the_same_defaults(function):
    known = DEFAULTS | {"quantile": DEFAULTS["head_quantile"]}
    shared = {n: p.default for n, p in inspect.signature(function).parameters.items() if n in known}
    shared = {name: default for name, default in shared.items() if default is not inspect.Parameter.empty}
    shared.pop("groups", None)
    assert shared
    assert shared == {name: known[name] for name in shared}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"mode": "coupling"}, ValueError, "mode must be one of local, .*, got 'coupling'"),
        ({"mode": None}, ValueError, "mode must be one of .*, got None"),
        ({"gamma_amp": 0}, ValueError, "gamma_amp must be above 0 and finite, got 0"),
        ({"gamma_amp": math.nan}, ValueError, "gamma_amp must be .*, got nan"),
        ({"gamma_amp": "1.5"}, TypeError, "gamma_amp must be a float, got str '1.5'"),
        ({"top": 1.5}, ValueError, "top must be above 0 and at most 1, got 1.5"),
        ({"alpha": -1}, ValueError, "alpha must be from 0 to 1, got -1"),
        ({"neighbors": 0}, ValueError, "neighbors must be at least 1, got 0"),
        ({"window": 2.5}, TypeError, "window must be an int, got float 2.5"),
        ({"horizon": (10, 5)}, ValueError, r"horizon\[1\] must be at least 10, got 5"),
        ({"horizon": 10}, ValueError, "horizon must be a pair .*, got 10"),
        ({"layers": "middle"}, ValueError, "layers must be 'middle5', .*, got 'middle'"),
        ({"layers": [1.5]}, ValueError, r"layers must be .*, got \[1.5\]"),
        ({"layers": 3}, ValueError, "layers must be .*, got 3"),
        ({"head_quantile": 0}, ValueError, "head_quantile must be above 0 and at most 1, got 0"),
        ({"groups": 3}, TypeError, "groups must be HeadGroups or a file of them, got int"),
        ({"regroup_steps": -1}, ValueError, "regroup_steps must be at least 0, got -1"),
        ({"sign": "plus"}, ValueError, "sign must be one of both, positive, negative, got 'plus'"),
        ({"sign": ["both"]}, ValueError, r"sign must be .*, got \['both'\]"),
    ],
)
def test_wrong_settings_are_named(changed, error, message):
    with pytest.raises(error, match=message):
        RhythmSettings(**changed)
    with pytest.raises(error, match=message):
        dataclasses.replace(RhythmSettings(), **changed)


def test_settings_are_values():
    """Equal, hashable where read from a file, and not to be changed behind the checks."""
    settings = RhythmSettings(horizon=[10, None], layers=[1, 2])
    assert settings.horizon == (10, None)
    assert settings == RhythmSettings(horizon=(10, None), layers=(1, 2))
    assert len({settings, RhythmSettings()}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.top = 0.5


def test_groups_are_read_from_a_file(tmp_path):
    groups = rk.HeadGroups([(1, 0)], [(2, 3)])
    groups.save(tmp_path / "groups.json")
    assert RhythmSettings().load_groups() is None
    assert RhythmSettings(groups=groups).load_groups() is groups
    for path in (tmp_path / "groups.json", str(tmp_path / "groups.json")):
        assert RhythmSettings(groups=path).load_groups() == groups
    (tmp_path / "none.json").write_text("[]")
    for name, said in (("none.json", "none.json"), ("absent.json", "No such file")):
        with pytest.raises(ValueError, match=f"groups must be a file .*{name}.*{said}"):
            RhythmSettings(groups=tmp_path / name).load_groups()


def test_they_need_no_trainer():
    code = (
        "import sys, rhythm_kernels as rk; rk.RhythmSettings(); assert 'transformers' not in sys.modules; "
        "rk.RhythmCredit; assert not {'trl', 'accelerate', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
