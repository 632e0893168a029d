"""The mixin's settings and refusals: where they come from; which trainers, losses and orders of bases are refused."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import trl
from packaging.version import Version
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer, RLOOTrainer

from rhythm_kernels import RhythmSettings
from rhythm_kernels.integrations.trl import RhythmFields, RhythmGRPOConfig, RhythmGRPOTrainer, RhythmMixin
from rhythm_kernels.integrations.trl import refusals as trl_refusals
from rhythm_kernels.integrations.trl.loss import LossInputs

from .test_trl_mixin import Logs, OwnLoss, build, over
from .toy import RHYTHM, options

SHORT = RhythmSettings(window=RHYTHM["rhythm_window"], horizon=RHYTHM["rhythm_horizon"])


@dataclass
class TheirConfig(GRPOConfig):
    theirs: int = 3


@dataclass
class MyConfig(RhythmFields, TheirConfig):
    pass


@dataclass
class LateConfig(TheirConfig, RhythmFields):
    """The other way round, so that nobody calls the checks of the fields at once."""


def test_where_the_settings_come_from(tmp_path, monkeypatch, caplog):
    plain, mixed = TheirConfig(**options(tmp_path)), MyConfig(**options(tmp_path), rhythm_top=0.3, theirs=4)
    monkeypatch.delenv("RHYTHM_CREDIT", raising=False)
    kind = over(RhythmMixin, GRPOTrainer)
    message = (
        "args must be a RhythmGRPOConfig, got TheirConfig: .* RhythmFields; .* rhythm=RhythmSettings.* RHYTHM_CREDIT"
    )
    for refused in (kind, RhythmGRPOTrainer):
        with pytest.raises(TypeError, match=message):
            build(refused, plain)
    assert build(kind, mixed).rhythm.settings.top == 0.3 and mixed.theirs == 4
    with pytest.raises(TypeError, match="rhythm must be left out beside a MyConfig, got both"):
        build(kind, mixed, rhythm=SHORT)
    with pytest.raises(TypeError, match="rhythm must be a RhythmSettings, got dict"):
        build(kind, plain, rhythm={"top": 0.3})
    assert build(kind, plain, rhythm=SHORT).rhythm.settings == SHORT
    monkeypatch.setenv("RHYTHM_CREDIT", "window=4,horizon=2:8")
    caplog.clear()
    assert build(RhythmGRPOTrainer, plain).rhythm.settings == SHORT
    assert caplog.messages == [
        f"rhythm credit is on in RhythmGRPOTrainer (TRL {trl.__version__}; settings from RHYTHM_CREDIT): mode=coupled, "
        "gamma_amp=1.5, top=0.4, alpha=0.5, neighbors=3, window=4, horizon=2:8, layers=middle5, head_quantile=0.3, "
        "groups=null, regroup_steps=0, sign=both; attention is measured in the training forward"
    ]
    off = TheirConfig(**options(tmp_path, num_iterations=2))
    monkeypatch.setenv("RHYTHM_CREDIT", "mode=local")
    build(kind, off)
    assert caplog.messages[-1].endswith("measured in the old-log-prob pass")
    monkeypatch.setenv("RHYTHM_CREDIT", "mode=uniform")
    build(kind, plain)
    assert "rhythm credit is off in Mine" in caplog.messages[-1]
    monkeypatch.setenv("RHYTHM_CREDIT", "mode=up")
    with pytest.raises(ValueError, match=r"RHYTHM_CREDIT.*mode must be one of"):
        build(kind, plain)


def test_a_configuration_without_the_decorator(tmp_path):
    class Plain(TheirConfig, RhythmFields):
        pass

    with pytest.raises(TypeError, match=r"Plain must be a dataclass: put @dataclass on it"):
        build(RhythmGRPOTrainer, Plain(**options(tmp_path)))


def test_without_a_configuration(tmp_path, monkeypatch):
    """The defaults of TRL and of credit, or those that were given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RHYTHM_CREDIT", raising=False)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)  # TRL's default
    made = build(RhythmGRPOTrainer, None)
    assert isinstance(made.args, RhythmGRPOConfig) and made.rhythm.settings == RhythmSettings()
    assert build(RhythmGRPOTrainer, None, rhythm=SHORT).rhythm.settings == SHORT
    with pytest.raises(TypeError, match="args must be a RhythmGRPOConfig, got NoneType"):
        build(over(RhythmMixin, GRPOTrainer), None)


def test_settings_may_be_set_anew_where_no_configuration_has_them(tmp_path):
    trainer = build(over(RhythmMixin, GRPOTrainer), GRPOConfig(**options(tmp_path, max_steps=1)), rhythm=SHORT)
    trainer.rhythm.settings = dataclasses.replace(SHORT, gamma_amp=3.0)
    trainer.train()
    assert trainer.state.log_history[0]["rhythm/gamma_mean"] > 1.5


@pytest.mark.parametrize("config", [TheirConfig, MyConfig, LateConfig])
def test_blind_credit_is_refused_whatever_the_configuration(tmp_path, config):
    given = {} if issubclass(config, RhythmFields) else {"rhythm": SHORT}
    with pytest.raises(ValueError, match=r"importance_sampling_level must be 'token' .*, got 'sequence'"):
        build(
            over(RhythmMixin, GRPOTrainer), config(**options(tmp_path, importance_sampling_level="sequence")), **given
        )


def test_blind_credit_is_refused_of_a_configuration_that_the_trainer_makes(tmp_path):
    class Theirs(GRPOTrainer):
        def __init__(self, model, reward_funcs, args, *rest, **kwargs):
            args = args or GRPOConfig(**options(tmp_path, importance_sampling_level="sequence"))
            super().__init__(model, reward_funcs, args, *rest, **kwargs)

    with pytest.raises(ValueError, match=r"importance_sampling_level must be 'token' .*, got 'sequence'"):
        build(over(RhythmMixin, Theirs), None, rhythm=SHORT)


def test_divergences_of_a_forward_that_is_not_measured_are_refused(tmp_path):
    args = RhythmGRPOConfig(**options(tmp_path))
    args.divergence_type = "topk_tv"
    with pytest.raises(ValueError, match="divergence_type must be 'binary_tv' or 'binary_kl', got 'topk_tv'"):
        build(RhythmGRPOTrainer, args)


def test_the_mixin_stands_before_the_trainer():
    for bases in ((GRPOTrainer, RhythmMixin), (over(OwnLoss, GRPOTrainer), RhythmMixin)):
        with pytest.raises(
            TypeError, match=r"bases of Mine must name RhythmMixin before any GRPOTrainer, got \((GRPO|Mi)"
        ):
            over(*bases)


def test_other_trainers_are_refused_by_name():
    with pytest.raises(TypeError, match=r"must heed token advantages, got RLOOTrainer: .* one ratio"):
        over(RhythmMixin, RLOOTrainer)
    with pytest.raises(TypeError, match="trainer of Mine must be a GRPOTrainer, got Trainer"):
        over(RhythmMixin, Trainer)
    part = over(RhythmMixin, Logs)  # of a trainer to come
    with pytest.raises(TypeError, match="trainer of Mine must be a GRPOTrainer, got none"):
        part()
    gmpo = pytest.importorskip("trl.experimental.gmpo").GMPOTrainer
    with pytest.raises(
        TypeError, match="must heed token advantages, got GMPOTrainer: its loss weighs a response by one"
    ):
        over(RhythmMixin, gmpo)


@pytest.mark.parametrize(("package", "name"), trl_refusals._REFUSED)
def test_refused_names_are_those_of_their_package_alone(package, name):
    def named(module):
        return type(name, (GRPOTrainer,), {"__module__": module})

    with pytest.raises(TypeError, match=f"got {name}: "):
        over(RhythmMixin, over(named(f"{package}.somewhere")))
    over(RhythmMixin, named("mine"))


# Trainers of TRL 1.0.0 to 1.16.0 that extend GRPOTrainer, and are not refused: tried with those versions.
WORK = {"DPPOTrainer", "GFPOTrainer", "GRPOTrainer"}


def test_every_trainer_of_trl_was_read():
    """A new one fails here: read its loss and what it does to a batch, then refuse it or add it."""
    found = set()
    for path in Path(trl.__file__).parent.rglob("*_trainer.py"):
        found |= set(re.findall(r"^class (\w+)\([^)]*GRPOTrainer\b", path.read_text(), re.MULTILINE))
    assert "GMPOTrainer" in found or Version(trl.__version__) < Version("1.7")
    assert found <= WORK | {name for _, name in trl_refusals._REFUSED}


def test_inputs_of_a_loss():
    """They are a batch like any other, but for advantages that are made when they are asked for."""
    asked = []
    batch = {"advantages": 1, "rest": 2}
    read = LossInputs(batch, lambda: asked.append(1) or 3)
    assert read["rest"] == read.get("rest") == 2 and "advantages" in read and read.get("other") is None
    assert list(read) == ["advantages", "rest"] and not asked
    read["rest"], read["new"] = 4, 5
    assert batch == {"advantages": 1, "rest": 4, "new": 5} and not asked
    assert read["advantages"] == 3 and {**read} == dict(read.items()) == read.copy() == {**batch, "advantages": 3}
    assert asked == [1]
    read["advantages"] = 6
    assert read["advantages"] == 6 and batch["advantages"] == 1
    del read["new"]
    assert len(read) == 2
