"""The page on prime-rl: its wrappers, over a stand-in of their trainer, give the loss gamma of full maps."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.rnn import pad_sequence

from ..toy import WORDS, build_model
from .page import gamma_from_maps, groups_from_maps, install, page_code, ragged, run_page

PACKAGE = ("git+https://github.com/PrimeIntellect-ai/prime-rl", "559b44772e471d1538537b8805cc77f3824a5e64")
_CONFIGS = "packages/prime-rl-configs/src/prime_rl/configs"
NAMES = [
    (f"{_CONFIGS}/trainer.py", "DefaultLossConfig", None),
    (f"{_CONFIGS}/trainer.py", "CustomLossConfig.import_path", None),
    (f"{_CONFIGS}/trainer.py", "CustomLossConfig.kwargs", None),
    (f"{_CONFIGS}/trainer.py", "ModelConfig.impl", None),
    (f"{_CONFIGS}/trainer.py", "ModelConfig.attn", None),
    (f"{_CONFIGS}/trainer.py", "ModelConfig.cp", None),
    (f"{_CONFIGS}/orchestrator.py", "OrchestratorConfig.max_off_policy_steps", None),
    ("src/prime_rl/trainer/rl/data.py", "DataLoader", None),
    ("src/prime_rl/trainer/rl/data.py", "DataLoader.get_batch", ("self",)),
    ("src/prime_rl/trainer/rl/data.py", "TensorMicroBatch.loss_mask", None),
    ("src/prime_rl/trainer/rl/data.py", "TensorMicroBatch.rl_weights", None),
    ("src/prime_rl/trainer/rl/loss.py", "default_loss_fn", ("inputs", "loss_config")),
    ("src/prime_rl/trainer/rl/loss.py", "compute_loss", ("trainer_logprobs", "inference_logprobs", "ref_logprobs")),
    ("src/prime_rl/trainer/rl/train.py", "compute_loss", None),
    ("src/prime_rl/trainer/rl/train.py", "forward", None),
    ("src/prime_rl/trainer/model.py", "forward", ("model", "input_ids", "position_ids", "seq_lens")),
]


@dataclass
class DefaultLossConfig:
    adv_tau: float = 1.0
    kl_tau: float = 1e-3


def default_loss_fn(inputs, loss_config):
    """A surrogate of token ratios with a KL term, of one sequence."""
    log_ratio = inputs.trainer_logprobs - inputs.inference_logprobs
    per_token = -log_ratio.exp() * loss_config.adv_tau * inputs.advantages + loss_config.kl_tau * log_ratio**2
    return types.SimpleNamespace(loss=(per_token * inputs.loss_mask).sum(), metrics={})


def sequence_ratio_loss_fn(inputs, loss_config):
    log_ratio = ((inputs.trainer_logprobs - inputs.inference_logprobs) * inputs.loss_mask).sum()
    return types.SimpleNamespace(loss=-(log_ratio.exp() * inputs.advantages * inputs.loss_mask).sum(), metrics={})


def with_their_head(model):
    """A transformers model whose layers are checkpointed, as they are by default, and whose forward gives log-probs."""

    def new_forward(
        self,
        input_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        logits_to_keep=0,
        temperature=None,
        **kwargs,
    ):
        hidden = self.model(input_ids=input_ids, position_ids=position_ids, **kwargs).last_hidden_state
        scaled = self.lm_head(hidden) / temperature.unsqueeze(-1)
        return {"logprobs": scaled.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)}

    for name, layer in list(model.model.layers.named_children()):
        model.model.layers.register_module(name, checkpoint_wrapper(layer, preserve_rng_state=False))
    model.config.use_cache = False
    model.forward = types.MethodType(new_forward, model)
    return model


def make_trainer(model, rl_loss_fn):
    """The module of prime-rl's trainer: a step over the batches of a loader."""
    trainer = types.ModuleType("prime_rl.trainer.rl.train")
    trainer.__spec__ = types.SimpleNamespace(name="prime_rl.trainer.rl.train")
    trainer.met = []

    def forward(model, input_ids, position_ids, *, seq_lens, labels=None, temperature=None, **named):
        return model(input_ids=input_ids, labels=labels, temperature=temperature, position_ids=position_ids)

    def compute_loss(
        trainer_logprobs,
        inference_logprobs,
        ref_logprobs,
        advantages,
        loss_mask,
        rl_weights,
        ce_weights,
        ref_kl_weights,
        rl_loss_fn,
        rl_scale,
        ce_scale,
        ref_kl_scale,
    ):
        total = trainer_logprobs[0].sum() * 0.0
        for ours, theirs, advantage, mask in zip(trainer_logprobs, inference_logprobs, advantages, loss_mask):
            inputs = types.SimpleNamespace(
                trainer_logprobs=ours, inference_logprobs=theirs, advantages=advantage, loss_mask=mask
            )
            total = total + rl_loss_fn(inputs).loss
        trainer.met.append(torch.cat(tuple(advantages)))
        return total / rl_scale, {}

    def step(loader, **extra):
        losses = []
        for micro_batch in loader.get_batch():
            tokens = micro_batch["input_ids"]
            out = trainer.forward(
                model,
                tokens,
                micro_batch["position_ids"],
                labels=torch.cat([tokens[:, 1:], tokens[:, :1] * 0], dim=1),
                temperature=torch.ones_like(tokens),
                mm_kwargs=None,
                mm_token_type_ids=None,
                seq_lens=torch.tensor(micro_batch["sequence_lengths"]),
                routed_experts=None,
                **{"seq_lens_are_pre_shard": False, **extra},
            )
            logprobs = torch.cat([torch.zeros(1, 1), out["logprobs"][:, :-1]], dim=1)
            lengths = micro_batch["sequence_lengths"]
            loss, tensors = trainer.compute_loss(
                trainer_logprobs=logprobs.squeeze().split(lengths),
                inference_logprobs=micro_batch["inference_logprobs"].squeeze().split(lengths),
                ref_logprobs=None,
                advantages=micro_batch["advantages"].squeeze().split(lengths),
                loss_mask=micro_batch["loss_mask"].squeeze().split(lengths),
                rl_weights=None,
                ce_weights=None,
                ref_kl_weights=None,
                rl_loss_fn=rl_loss_fn,
                rl_scale=100,
                ce_scale=1,
                ref_kl_scale=1,
            )
            loss.backward()
            losses.append((loss.item(), tensors))
        return losses

    trainer.forward, trainer.compute_loss, trainer.step = forward, compute_loss, step
    return trainer


def pack(rows, loss_masks, advantages, padding):
    """A micro-batch of several sequences, and padding that counts as the last one's."""
    lengths = [len(row) for row in rows]
    lengths[-1] += padding
    flat = lambda parts, fill: torch.cat([*parts, torch.full((padding,), fill, dtype=parts[0].dtype)])[None]  # noqa: E731
    return {
        "input_ids": flat(rows, 1),
        "position_ids": torch.cat([torch.arange(n) for n in [*map(len, rows), padding]])[None],
        "loss_mask": flat(loss_masks, False),
        "advantages": flat([torch.full((len(row),), value) for row, value in zip(rows, advantages)], 0.0),
        "inference_logprobs": torch.full((1, sum(lengths)), -3.0),
        "sequence_lengths": lengths,
        "rl_weights": None,
    }


def sequences():
    """Four of a prompt and a response; in the second one an environment wrote some of the response, and its end."""
    prompts, responses = ragged([5, 3, 9, 4], [40, 44, 33, 21], len(WORDS))
    rows = [torch.cat(pair) for pair in zip(prompts, responses)]
    masks = [torch.arange(len(row)) >= len(prompt) for row, prompt in zip(rows, prompts)]
    masks[1][11:15] = masks[1][-6:] = False
    return rows, masks


class DataLoader:
    """Two micro-batches a step."""

    def get_batch(self):
        rows, masks = sequences()
        return [pack(rows[:3], masks[:3], [1.0, -0.5, 0.25], 7), pack(rows[3:], masks[3:], [2.0], 0)]


def prime(monkeypatch, model=None, loss_fn=default_loss_fn, started_as=None):
    """The page's module beside a trainer that is started as a module, or by its entry point."""
    loader = type("DataLoader", (DataLoader,), {"get_batch": DataLoader.get_batch})
    install(
        monkeypatch,
        {
            "prime_rl.configs.trainer": {"DefaultLossConfig": DefaultLossConfig},
            "prime_rl.trainer.rl.data": {"DataLoader": loader},
            "prime_rl.trainer.rl.loss": {"default_loss_fn": loss_fn},
        },
    )
    model = with_their_head(model or build_model())
    trainer = make_trainer(model, lambda inputs: page.loss(inputs))
    monkeypatch.setitem(sys.modules, started_as or "prime_rl.trainer.rl.train", trainer)
    (code,) = page_code("prime_rl.md")
    page = run_page(monkeypatch, "rhythm_prime", code)
    return page, trainer, loader(), model


@pytest.fixture(autouse=True)
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("mode", ["coupled", "global"])
@pytest.mark.parametrize("started_as", ["__main__", "prime_rl.trainer.rl.train"])
def test_the_loss_gets_advantages_times_gamma_of_full_maps(monkeypatch, mode, started_as):
    page, trainer, loader, _ = prime(monkeypatch, started_as=started_as)
    page.SETTINGS = replace(page.SETTINGS, mode=mode)
    logged = trainer.step(loader)
    rows, masks = sequences()
    tokens = pad_sequence(rows, batch_first=True)
    live, mask = (pad_sequence(parts, batch_first=True) for parts in ([torch.ones_like(r).bool() for r in rows], masks))
    gamma = gamma_from_maps(build_model(), tokens, live, mask, page.State.credit.groups, page.SETTINGS)
    assert ((gamma > 1) & mask).sum() > 20
    want = [g[: len(row)] * a for g, row, a in zip(gamma, rows, (1.0, -0.5, 0.25, 2.0))]
    torch.testing.assert_close(trainer.met[0], torch.cat([*want[:3], torch.zeros(7)]))
    torch.testing.assert_close(trainer.met[1], want[3])
    bonus = torch.cat([(g[: len(row)] - 1)[m] for g, row, m in zip(gamma, rows, masks)])
    torch.testing.assert_close(torch.cat([tensors["rhythm_bonus"] for _, tensors in logged]), bonus)
    assert page.State.seen
    groups = groups_from_maps(build_model(), tokens[:3], live[:3], mask[:3], page.SETTINGS)  # of the first micro-batch
    assert (list(page.State.credit.groups.local), list(page.State.credit.groups.global_)) == groups


def test_gamma_of_one_leaves_every_bit(monkeypatch):
    page, trainer, loader, model = prime(monkeypatch)
    page.SETTINGS = replace(page.SETTINGS, gamma_amp=1.0)
    losses = [loss for loss, _ in trainer.step(loader)]
    theirs = with_their_head(build_model())
    plain = make_trainer(theirs, page.loss)
    assert losses == [loss for loss, _ in plain.step(DataLoader())]
    for mine, other in zip(model.parameters(), theirs.parameters()):
        assert torch.equal(mine.grad, other.grad)


def test_groups_are_made_once_and_again_where_it_is_asked_for(monkeypatch):
    page, trainer, loader, _ = prime(monkeypatch)
    page.SETTINGS = replace(page.SETTINGS, regroup_steps=2)
    made = []
    for _ in range(3):
        trainer.step(loader)
        made.append(page.State.credit.groups)
    assert made[0] is made[1]
    assert made[1] is not made[2]


def test_a_loss_of_one_ratio_a_response_is_refused_in_the_first_step(monkeypatch):
    _, trainer, loader, _ = prime(monkeypatch, loss_fn=sequence_ratio_loss_fn)
    with pytest.raises(RuntimeError, match="does not see which tokens credit chose"):
        trainer.step(loader)


def test_what_it_cannot_honour_is_refused_by_name(monkeypatch):
    model = build_model()
    own = type("Qwen3ForCausalLM", (type(model),), {"__module__": "prime_rl.trainer.models.qwen3.modeling_qwen3"})
    model.__class__ = type("FSDPQwen3ForCausalLM", (own,), {})
    page, trainer, loader, _ = prime(monkeypatch, model)
    with pytest.raises(ValueError, match=r"trainer.model.impl must be 'hf', got 'custom'"):
        trainer.step(loader)
    page, trainer, loader, _ = prime(monkeypatch)
    with pytest.raises(ValueError, match=r"trainer.model.cp must be 1"):
        trainer.step(loader, seq_lens_are_pre_shard=True)
    page.SETTINGS = replace(page.SETTINGS, mode="entropy")
    with pytest.raises(ValueError, match="SETTINGS must be of mode local, global or coupled, got 'entropy'"):
        trainer.step(loader)


def test_a_trainer_that_has_moved_stops_the_import_or_the_first_step(monkeypatch):
    with pytest.raises(ImportError, match=r"must be imported by prime_rl.trainer.rl.train"):
        prime(monkeypatch, started_as="prime_rl.trainer.elsewhere")
    page, trainer, loader, _ = prime(monkeypatch)
    trainer.forward, trainer.compute_loss = page.plain_forward, page.plain_loss
    with pytest.raises(RuntimeError, match="does not call what was wrapped"):
        trainer.step(loader)


def test_the_log_says_so(monkeypatch, capsys, caplog):
    _, trainer, loader, _ = prime(monkeypatch)
    trainer.step(loader)
    assert "rhythm credit is on in prime-rl's trainer" in capsys.readouterr().err + caplog.text
