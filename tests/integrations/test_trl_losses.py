"""Whether credit reaches tokens, for every loss of TRL at every level of importance sampling: refused where it cannot.

A ratio of the whole response multiplies the sum of its tokens' advantages, so which of them gamma chose is lost in
their mean. That is found here by measuring TRL's gradient, and the refusals are held to it.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap

import pytest
import torch
from trl import GRPOTrainer

from rhythm_kernels.integrations.trl import RhythmGRPOConfig, RhythmGRPOTrainer

from .toy import WORDS, build_model, build_tokenizer, dataset, options, reward, train


def settings_of_the_loss(name):
    """The values that TRL's loss compares one of its settings with: those that it knows."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(GRPOTrainer._compute_loss)))
    compared = [c for c in ast.walk(tree) if isinstance(c, ast.Compare) and getattr(c.left, "attr", None) == name]
    found = {
        x.value for c in compared for place in c.comparators for x in ast.walk(place) if isinstance(x, ast.Constant)
    }
    assert found, f"TRL's loss no longer compares {name} with anything: find its values elsewhere"
    return sorted(found)


LOSSES, LEVELS = settings_of_the_loss("loss_type"), settings_of_the_loss("importance_sampling_level")


def test_every_loss_of_trl_is_met_here():
    """Those that were looked at. A version of TRL with another one fails here: read it, then add it."""
    assert LOSSES == ["bnpo", "cispo", "dapo", "dr_grpo", "grpo", "luspo", "sapo", "vespo"]
    assert LEVELS == ["sequence", "token"]


def a_batch(trainer, off_policy):
    """Four responses of different lengths, with gamma; the ratio is 1 only where the policy is the one that wrote."""
    lengths = torch.tensor([12, 9, 7, 11])
    mask = (torch.arange(12) < lengths[:, None]).int()
    inputs = {
        "prompt_ids": torch.randint(2, len(WORDS), (4, 5)),
        "prompt_mask": torch.ones(4, 5, dtype=torch.int),
        "completion_ids": torch.randint(2, len(WORDS), (4, 12)),
        "completion_mask": mask,
        "advantages": torch.tensor([1.0, -0.7, 0.4, -1.3]),
        "num_items_in_batch": mask.sum(),
    }
    if off_policy:
        tokens, live = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        with torch.no_grad():
            logps = trainer._get_per_token_logps_and_entropies(trainer.model, tokens, live, 12)[0]
        inputs["old_per_token_logps"] = logps + 0.05 * torch.randn_like(logps)
    gamma = torch.where(torch.rand(4, 12) < 0.4, 1.5, 1.0)
    gamma[:, 0], gamma[:, 1] = 1.5, 1.0  # chosen and not in every response
    return inputs, torch.where(mask.bool(), gamma, 1.0), lengths


def gradient(trainer, inputs, gamma):
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, {**inputs, "rhythm_gamma": gamma}).backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


def permuted(gamma, lengths):
    """The same values of gamma, on other tokens of their response."""
    other = gamma.clone()
    for row, length in enumerate(lengths.tolist()):
        other[row, :length] = gamma[row, :length].roll(1)
    return other


def build(folder, **changed):
    args = RhythmGRPOConfig(**options(folder, **changed))
    return RhythmGRPOTrainer(build_model(), reward, args, dataset(), processing_class=build_tokenizer())


@pytest.mark.parametrize("off_policy", [False, True], ids=["ratio of one", "other ratios"])
@pytest.mark.parametrize(("loss", "level"), list(itertools.product(LOSSES, LEVELS)))
def test_credit_reaches_tokens_or_is_refused(tmp_path, loss, level, off_policy):
    changed = {"loss_type": loss, "importance_sampling_level": level}
    trainer = build(tmp_path, rhythm_mode="uniform", rhythm_gamma_amp=1.0, **changed)  # takes all that TRL takes
    trainer.args.rhythm_mode = "random"  # but reads gamma, where inputs have it
    trainer.current_gradient_accumulation_steps = 1
    inputs, gamma, lengths = a_batch(trainer, off_policy)
    other = permuted(gamma, lengths)
    assert ((other != gamma).sum(1) >= 2).all()
    before = gradient(trainer, inputs, gamma)
    moved = float((gradient(trainer, inputs, other) - before).norm() / before.norm())
    unshaped = float((gradient(trainer, inputs, torch.ones_like(gamma)) - before).norm() / before.norm())
    assert unshaped > 1e-2  # gamma is read; the question is by which tokens
    assert moved < 1e-5 or moved > 1e-2

    for mode in ("coupled", "local", "global", "random", "entropy"):
        if moved > 1e-2:
            RhythmGRPOConfig(**options(tmp_path), rhythm_mode=mode, **changed)
            continue
        with pytest.raises(
            ValueError, match=f"importance_sampling_level must be 'token' .*loss_type='{loss}', got '{level}'"
        ):
            RhythmGRPOConfig(**options(tmp_path), rhythm_mode=mode, **changed)


def test_a_level_set_after_construction_is_refused(tmp_path):
    args = RhythmGRPOConfig(**options(tmp_path))
    args.importance_sampling_level = "sequence"
    with pytest.raises(ValueError, match=r"importance_sampling_level must be 'token' .*, got 'sequence'"):
        RhythmGRPOTrainer(build_model(), reward, args, dataset(), processing_class=build_tokenizer())


def test_uniform_trains_at_sequence_level(tmp_path):
    changed = {"loss_type": "grpo", "importance_sampling_level": "sequence", "max_steps": 1}
    trainer = train(RhythmGRPOTrainer, RhythmGRPOConfig, tmp_path, rhythm_mode="uniform", **changed)
    assert trainer.state.global_step == 1
