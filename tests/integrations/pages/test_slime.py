"""The page on slime: its function, on lists as slime keeps them, gives the credit that reads no attention."""

from __future__ import annotations

import types

import pytest
import torch
import torch.distributed as dist

import rhythm_kernels as rk

from .page import page_code, run_page

PACKAGE = ("git+https://github.com/THUDM/slime", "a6272da0d4f3d0a08520c99a2f3b4f6c887960dc")  # v0.3.1
_LOSS, _ACTOR = "slime/backends/megatron_utils/loss.py", "slime/backends/megatron_utils/actor.py"
NAMES = [
    (_ACTOR, "MegatronTrainRayActor.rollout_data_postprocess", None),
    (_ACTOR, "MegatronTrainRayActor.train_actor", ("self", "rollout_id", "rollout_data")),
    (_LOSS, "compute_advantages_and_returns", ("args", "rollout_data")),
    (_LOSS, "get_log_probs_and_entropy", ("logits", "args", "unconcat_tokens", "total_lengths", "response_lengths")),
    ("slime/backends/megatron_utils/model.py", "forward_only", None),
    ("slime/utils/misc.py", "load_function", ("path",)),
]


@pytest.fixture
def slime(monkeypatch):
    """The page's module, in a process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    (code,) = page_code("slime.md")
    yield run_page(monkeypatch, "rhythm_slime", code)
    dist.destroy_process_group()


def arguments(**changed):
    return types.SimpleNamespace(**{"advantage_estimator": "grpo", "context_parallel_size": 1, **changed})


def rollout():
    """Three responses, of which one is empty and one has tokens of an environment, with distinct entropies."""
    generator = torch.Generator().manual_seed(0)
    lengths = [7, 0, 5]
    masks = [torch.ones(n, dtype=torch.int) for n in lengths]
    masks[0][2:4] = 0
    return {
        "advantages": [torch.full((n,), value) for n, value in zip(lengths, (1.0, 2.0, -0.5))],
        "entropy": [torch.rand(n, generator=generator) for n in lengths],
        "loss_masks": masks,
    }


def by_hand(data, amplitude=1.5, top=0.4):
    """The share `top` of a response's own tokens, those of most entropy, times gamma."""
    expected = []
    for advantages, entropy, mask in zip(data["advantages"], data["entropy"], data["loss_masks"]):
        own = [t for t in range(len(mask)) if mask[t]]
        count = -int(-top * len(own) // 1)
        chosen = sorted(own, key=lambda t: -float(entropy[t]))[:count]
        expected.append([float(a) * (amplitude if t in chosen else 1) for t, a in enumerate(advantages)])
    return expected


def test_tokens_of_most_entropy_get_the_bonus(slime, capsys, caplog):
    data, before = rollout(), rollout()
    data["returns"] = data["advantages"]
    slime.give_credit(arguments(), 0, data)
    assert all(map(torch.equal, data["returns"], before["advantages"]))
    assert [advantages.tolist() for advantages in data["advantages"]] == by_hand(before)
    assert "rhythm credit is on in slime's Megatron actor: mode=entropy" in capsys.readouterr().err + caplog.text
    slime.give_credit(arguments(), 1, rollout())
    assert "rhythm" not in capsys.readouterr().err  # once


def test_the_sign_and_gamma_of_one(slime):
    slime.SETTINGS = rk.RhythmSettings(mode="entropy", sign="negative")
    data, before = rollout(), rollout()
    slime.give_credit(arguments(), 0, data)
    assert torch.equal(data["advantages"][0], before["advantages"][0])
    assert data["advantages"][2].tolist() == by_hand(before)[2]
    slime.SETTINGS = rk.RhythmSettings(mode="entropy", gamma_amp=1.0)
    data = rollout()
    slime.give_credit(arguments(), 0, data)
    assert all(map(torch.equal, data["advantages"], before["advantages"]))


def test_random_credit_is_the_same_on_every_rank_and_new_in_every_rollout(slime):
    slime.SETTINGS = rk.RhythmSettings(mode="random")
    found = []
    for rollout_id in (0, 0, 1, 2, 3):
        data = rollout()
        del data["entropy"]
        slime.give_credit(arguments(), rollout_id, data)
        found.append(torch.cat(data["advantages"]))
    assert torch.equal(found[0], found[1])
    assert any(not torch.equal(found[0], other) for other in found[2:])
    assert all(((other != torch.cat(rollout()["advantages"])).sum() == 4) for other in found)


def test_stages_before_the_last_have_nothing_to_shape(slime):
    data = {"loss_masks": rollout()["loss_masks"]}
    slime.give_credit(arguments(), 0, data)
    assert list(data) == ["loss_masks"]


def test_what_it_cannot_honour_is_refused_by_name(slime):
    for changed, message in (
        ({"advantage_estimator": "gspo"}, r"--advantage-estimator must weigh tokens by their own ratio .*, got gspo"),
        ({"context_parallel_size": 2}, "--context-parallel-size must be 1, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            slime.give_credit(arguments(**changed), 0, rollout())
    data = rollout()
    del data["entropy"]
    with pytest.raises(RuntimeError, match="--use-rollout-entropy and --keep-old-actor"):
        slime.give_credit(arguments(), 0, data)
    slime.SETTINGS = rk.RhythmSettings(mode="coupled")
    with pytest.raises(
        ValueError, match=r"SETTINGS.mode must be entropy, random or uniform under Megatron, got coupled"
    ):
        slime.give_credit(arguments(), 0, rollout())
