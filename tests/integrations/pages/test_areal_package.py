"""The page on AReaL over AReaL itself: its packing, micro-batches, forward and advantages, on a CPU and one process.

Its engine is started by hand, as starting it needs a GPU; all else of it runs. Skipped where it is not installed.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import types

import pytest
import torch
import torch.distributed as dist

from ...probe import flash_standin
from ..toy import build_model
from .page import gamma_from_maps, page_code, run_page
from .test_areal import batch


def initialize(self, addr, ft_spec, *args, **kwargs):
    """What of starting an engine its passes and an update without an optimizer need."""
    self.model, self.device = build_model(), torch.device("cpu")
    self.parallel_helper = types.SimpleNamespace(tp_size=1, sp_size=1, dp_size=1)
    self.dp_group = dist.group.WORLD
    self.logger = logging.getLogger("areal engine")
    self._ensure_ready = self.optimizer_zero_grad = lambda: None
    self.optimizer_step = dict


@pytest.fixture
def module(monkeypatch):
    """The page's module, over the installed package, in a process group of one."""
    if importlib.util.find_spec("areal") is None:
        assert os.environ.get("PEERS") != "required", "areal is not installed"
        pytest.skip("areal environment")
    import areal.engine
    from areal.engine.fsdp_engine import FSDPEngine, FSDPPPOActor

    monkeypatch.setattr(FSDPEngine, "initialize", initialize)
    monkeypatch.setattr(areal.engine, "FSDPPPOActor", FSDPPPOActor, raising=False)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    (code,) = page_code("areal.md")
    yield run_page(monkeypatch, "rhythm_areal", code)
    dist.destroy_process_group()


def config(folder, **changed):
    from areal.api.cli_args import MicroBatchSpec, NormConfig, OptimizerConfig, PPOActorConfig

    build_model().save_pretrained(folder)  # whose configuration an engine reads
    named = {"experiment_name": "rhythm", "trial_name": "page", "path": str(folder)}
    normalised = NormConfig(mean_level="batch", std_level="batch")
    micro_batches = MicroBatchSpec(max_tokens_per_mb=100)  # two, of two sequences each
    return PPOActorConfig(
        **named,
        **{"recompute_logprob": True, **changed},
        optimizer=OptimizerConfig(),
        mb_spec=micro_batches,
        adv_norm=normalised,
    )


def trajectories():
    """The batch as a rollout hands it over: a dict each, of its own length."""
    data = batch()
    data["logprobs"] = torch.zeros(data["input_ids"].shape)
    data["versions"] = torch.zeros_like(data["input_ids"])
    lengths = data["attention_mask"].sum(1).tolist()
    return data, [
        {name: x[i : i + 1, :n] if x.dim() == 2 else x[i : i + 1] for name, x in data.items()}
        for i, n in enumerate(lengths)
    ]


def advantages(made, settings):
    """An engine, and what it makes of the rollout: log-probs, and the trajectories with advantages."""
    engine = made(settings)
    engine.initialize(None, object())
    _, data = trajectories()
    with flash_standin.installed(engine.model):
        log_probs = engine.compute_logp(data)
    for one, found in zip(data, log_probs):
        one["prox_logp"] = found
    return engine, log_probs, engine.compute_advantages(data)


def test_advantages_are_theirs_times_gamma_of_full_maps(module, tmp_path):
    assert sys.modules["areal.engine"].FSDPPPOActor is module.RhythmFSDPPPOActor
    settings = config(tmp_path)
    engine, log_probs, shaped = advantages(module.RhythmFSDPPPOActor, settings)
    _, plain_log_probs, plain = advantages(module.FSDPPPOActor, settings)
    assert all(map(torch.equal, log_probs, plain_log_probs))
    data, _ = trajectories()
    tokens, live, mask = (data[name] for name in ("input_ids", "attention_mask", "loss_mask"))
    gamma = gamma_from_maps(build_model(), tokens, live > 0, mask > 0, engine.credit.groups, module.SETTINGS)
    assert ((gamma != 1) & (mask > 0)).sum() > 20
    for row, (theirs, ours) in enumerate(zip(plain, shaped)):
        length = ours["advantages"].shape[1]
        rolled = torch.cat([gamma[row, 1:length], torch.ones(1)])
        assert torch.equal(ours["advantages"], theirs["advantages"] * rolled)
        assert torch.equal(ours["returns"], theirs["returns"])


@pytest.mark.parametrize("sapo", [False, True])
def test_their_loss_sees_the_tokens_and_one_of_whole_responses_is_refused(module, tmp_path, monkeypatch, sapo):
    from areal.trainer.ppo import actor

    settings = config(tmp_path, use_sapo_loss=sapo, use_decoupled_loss=False)
    engine, _, shaped = advantages(module.RhythmFSDPPPOActor, settings)
    engine.ppo_update(shaped)
    assert engine.seen
    engine, _, shaped = advantages(module.RhythmFSDPPPOActor, settings)
    theirs = actor.grpo_loss_fn

    def of_responses(*args, **named):
        return theirs(*args, **{**named, "importance_sampling_level": "sequence"})

    monkeypatch.setattr(actor, "grpo_loss_fn", of_responses)
    with pytest.raises(RuntimeError, match="does not see which tokens credit chose"):
        engine.ppo_update(shaped)


def test_what_their_configuration_asks_for_is_refused(module, tmp_path):
    for changed, message in (
        ({"recompute_logprob": False}, "actor.recompute_logprob .* must be true, .*, got False"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level must be token, got sequence"),
    ):
        engine = module.RhythmFSDPPPOActor(config(tmp_path, **changed))
        with pytest.raises(ValueError, match=message):
            engine.initialize(None, object())
