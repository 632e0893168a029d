"""Settings out of `RHYTHM_CREDIT`, and the line by which an adapter announces them."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from rhythm_kernels import HeadGroups, RhythmSettings
from rhythm_kernels.integrations.announce import announce, spelled
from rhythm_kernels.integrations.environment import settings_from_environment


def test_not_set_and_empty(monkeypatch):
    monkeypatch.delenv("RHYTHM_CREDIT", raising=False)
    assert settings_from_environment() is None
    monkeypatch.setenv("RHYTHM_CREDIT", " ")
    assert settings_from_environment() == RhythmSettings()


@pytest.mark.parametrize(
    "settings",
    [
        RhythmSettings(),
        RhythmSettings(mode="local", gamma_amp=2, top=0.25, alpha=1, neighbors=5, window=20, horizon=(5, None)),
        RhythmSettings(layers=[3], head_quantile=0.5, regroup_steps=10, sign="positive"),
        RhythmSettings(layers="all", horizon=(1, 2)),
        RhythmSettings(layers=[3, 4, -1]),
    ],
)
def test_what_is_announced_can_be_set(monkeypatch, settings):
    monkeypatch.setenv("RHYTHM_CREDIT", spelled(settings))
    assert settings_from_environment() == settings


def test_a_file_of_groups(monkeypatch, tmp_path):
    path = tmp_path / "1"  # a path that could be a number
    HeadGroups([(1, 0)], [(2, 3)]).save(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RHYTHM_CREDIT", "groups=1")
    assert settings_from_environment().groups == "1"
    assert spelled(RhythmSettings(groups=HeadGroups.load(path))).count("groups=1 local and 1 global heads") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("coupled", "RHYTHM_CREDIT must be NAME=VALUE,.* with names out of mode, .*, got 'coupled'"),
        ("mod=coupled", "RHYTHM_CREDIT must be .*, got 'mod=coupled'"),
        ("mode=coupled;top=0.3", "RHYTHM_CREDIT: mode must be one of .*, got 'coupled;top=0.3'"),
        ("top=0.3,top=0.4", "RHYTHM_CREDIT must name top once, got 'top=0.3,top=0.4'"),
        ("top=", "RHYTHM_CREDIT: top must be .*"),
        ("top=1.5", "RHYTHM_CREDIT: top must be above 0 and at most 1, got 1.5 in 'top=1.5'"),
        ("neighbors=2.5", "RHYTHM_CREDIT: neighbors must be .*"),
        ("horizon=10", "RHYTHM_CREDIT: horizon must be .*"),
        ("layers=first", "RHYTHM_CREDIT: layers must be .*"),
        ("groups=missing.json", "RHYTHM_CREDIT: groups must be a file .*missing.json"),
        ("mode=null", "RHYTHM_CREDIT: mode must be one of .*, got None"),
    ],
)
def test_wrong_words(monkeypatch, words, message):
    monkeypatch.setenv("RHYTHM_CREDIT", words)
    with pytest.raises(ValueError, match=f"^{message}"):
        settings_from_environment()


def test_announced_where_logging_is_configured(caplog):
    with caplog.at_level(logging.INFO, "rhythm_kernels"):
        announce("Trainer (1.0)", RhythmSettings(gamma_amp=2), "the old-log-prob pass")
        announce("Trainer (1.0)", RhythmSettings(mode="uniform"), "the old-log-prob pass")
        announce("Trainer (1.0)", RhythmSettings(mode="random"), "the old-log-prob pass")
    first, second, third = (record.getMessage() for record in caplog.records)
    assert first.startswith("rhythm credit is on in Trainer (1.0): mode=coupled, gamma_amp=2.0, ")
    assert first.endswith("attention is measured in the old-log-prob pass")
    assert "off in Trainer (1.0): mode=uniform" in second
    assert "attention" not in third


@pytest.mark.parametrize("before", ["", "import logging; logging.basicConfig(level='WARNING')\n"])
def test_announced_where_it_is_not(before):
    code = (
        f"{before}from rhythm_kernels import RhythmSettings\n"
        "from rhythm_kernels.integrations.announce import announce\n"
        "announce('T', RhythmSettings(), 'x')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr.count("rhythm credit is on in T: mode=coupled") == 1
