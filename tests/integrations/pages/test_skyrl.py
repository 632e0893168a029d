"""The page on SkyRL: its worker, over a stand-in of theirs, gives the loss advantages times gamma of full maps."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence

from ..toy import WORDS, build_model
from .page import gamma_from_maps, groups_from_maps, install, page_code, ragged, run_page

PACKAGE = ("skyrl", "0.4.0")
_WORKERS = "skyrl/backends/skyrl_train/workers"
NAMES = [
    (
        f"{_WORKERS}/fsdp/fsdp_worker.py",
        "FSDPPolicyWorkerBase.init_model",
        ("self", "model_path", "num_training_steps"),
    ),
    (f"{_WORKERS}/fsdp/fsdp_worker.py", "FSDPPolicyWorkerBase", None),
    (f"{_WORKERS}/fsdp/fsdp_worker.py", "PolicyWorker", None),
    (f"{_WORKERS}/worker.py", "PolicyWorkerBase._forward_micro_batch", ("self", "micro_batch")),
    (
        f"{_WORKERS}/worker.py",
        "PolicyWorkerBase._forward_backward_micro",
        ("self", "experience", "microbatch_weight", "loss_fn", "loss_fn_config", "return_per_token_outputs"),
    ),
    (f"{_WORKERS}/worker.py", "PolicyWorkerBase.policy_loss_fn", None),
    (
        "skyrl/backends/skyrl_train/utils/ppo_utils.py",
        "ppo_policy_loss",
        ("log_probs", "old_log_probs", "advantages", "config", "loss_mask", "rollout_logprobs"),
    ),
    (f"{_WORKERS}/model_wrapper.py", "HFModelWrapper.model", None),
    ("skyrl/train/dataset/replay_buffer.py", "Experience.sequences", None),
    ("skyrl/train/dataset/replay_buffer.py", "Experience.attention_mask", None),
    ("skyrl/train/dataset/replay_buffer.py", "Experience.advantages", None),
    ("skyrl/train/dataset/replay_buffer.py", "Experience.loss_mask", None),
    ("skyrl/train/entrypoints/main_base.py", "BasePPOExp", None),
    ("skyrl/train/entrypoints/main_base.py", "BasePPOExp._setup_trainer", ("self",)),
    ("skyrl/train/entrypoints/main_base.py", "BasePPOExp.run", ("self",)),
    ("skyrl/train/entrypoints/main_base.py", "main", ()),
    ("skyrl/train/config/__init__.py", "SkyRLTrainConfig", None),
    ("skyrl/train/config/config.py", "SkyRLTrainConfig.from_cli_overrides", None),
    ("skyrl/train/config/config.py", "TrainerConfig.recompute_old_logprobs_per_minibatch", None),
    ("skyrl/train/config/config.py", "TrainerConfig.remove_microbatch_padding", None),
    ("skyrl/train/config/config.py", "PolicyConfig.sequence_parallel_size", None),
    ("skyrl/train/utils/utils.py", "validate_cfg", ("cfg",)),
    ("skyrl/train/utils/utils.py", "initialize_ray", ("cfg",)),
]


class Batch(dict):
    """A batch of SkyRL: named tensors and metadata."""

    def __init__(self, tensors, metadata):
        super().__init__(tensors)
        self.metadata = metadata

    def rows(self, chosen):
        return Batch({name: tensor[chosen] for name, tensor in self.items()}, self.metadata)


class Wrapper(torch.nn.Module):
    """What a worker's `model` is: a transformers model inside, log-probs of the last tokens out; packed if asked to."""

    def __init__(self, model, packed):
        super().__init__()
        self.model, self.packed = model, packed

    def forward(self, sequences, num_actions, attention_mask):
        live = attention_mask.bool()
        positions = (attention_mask.cumsum(-1) - 1).masked_fill(~live, 1)
        if self.packed:
            flat = self.model(sequences[live][None], attention_mask=None, position_ids=positions[live][None]).logits[0]
            logits = flat.new_zeros(*live.shape, flat.shape[-1])
            logits[live] = flat
        else:
            logits = self.model(sequences, attention_mask=attention_mask, position_ids=positions).logits
        log_probs = logits.log_softmax(-1).gather(-1, sequences.roll(-1, 1).unsqueeze(-1)).squeeze(-1)
        return log_probs[:, -num_actions - 1 : -1]


class FSDPPolicyWorkerBase:
    """The flow of SkyRL's worker: both passes split a batch, the first one in an order of its own."""

    order = (3, 1, 0, 2)  # batching by tokens packs rows out of their order

    def __init__(self, cfg, model):
        self.cfg, self._given = cfg, model
        self.policy_loss_fn = ppo_policy_loss
        self.met = []  # the advantages that the loss was given

    def init_model(self, model_path, num_training_steps=None):
        self.model = Wrapper(self._given, self.cfg.remove_microbatch_padding)
        self.model.model.config.use_cache = False

    def forward(self, data, loss_fn=None, loss_fn_config=None, return_per_token_outputs=True):
        outputs = [self._forward_micro_batch(data.rows(list(self.order[i : i + 2]))) for i in (0, 2)]
        return torch.cat(outputs)[torch.tensor(self.order).argsort()]

    def _forward_micro_batch(self, micro_batch):
        self.model.eval()
        with torch.no_grad():
            return self.model(
                micro_batch["sequences"], micro_batch.metadata["response_length"], micro_batch["attention_mask"]
            )

    def forward_backward(self, data, loss_fn=None, loss_fn_config=None, return_per_token_outputs=True):
        statuses = []
        for row in range(len(data["sequences"])):
            part = data.rows([row])
            experience = types.SimpleNamespace(**part, num_actions=part.metadata["response_length"])
            statuses.append(self._forward_backward_micro(experience, 0.25, loss_fn=loss_fn))
        return statuses

    def _forward_backward_micro(
        self, experience, microbatch_weight, loss_fn=None, loss_fn_config=None, return_per_token_outputs=True
    ):
        self.model.train()
        log_probs = self.model(experience.sequences, experience.num_actions, experience.attention_mask)
        loss, _ = self.policy_loss_fn(
            log_probs,
            experience.action_log_probs,
            experience.advantages,
            config=self.cfg,
            loss_mask=experience.loss_mask,
            rollout_logprobs=None,
        )
        loss.backward()
        self.met.append(experience.advantages)
        return {"policy_loss": loss.item()}


def ppo_policy_loss(log_probs, old_log_probs, advantages, config, loss_mask=None, rollout_logprobs=None):
    ratio = (log_probs - old_log_probs).exp()
    return -(torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) * loss_mask).sum(), {"clip_ratio": 0.0}


def sequence_ratio_loss(log_probs, old_log_probs, advantages, config, loss_mask=None, rollout_logprobs=None):
    ratio = ((log_probs - old_log_probs) * loss_mask).sum(1, keepdim=True).exp()
    return -(ratio * advantages * loss_mask).sum(), {}


class BasePPOExp:
    def __init__(self, cfg):
        self.cfg = cfg

    def _setup_trainer(self):
        return sys.modules["skyrl.backends.skyrl_train.workers.fsdp.fsdp_worker"].PolicyWorker


@pytest.fixture
def skyrl(monkeypatch):
    """The page's module, in a process group of one."""
    remote = lambda *args, **kwargs: lambda wrapped: wrapped  # noqa: E731
    install(
        monkeypatch,
        {
            "ray": {"remote": remote, "get": lambda result: result},
            "skyrl.backends.skyrl_train.workers.fsdp.fsdp_worker": {
                "FSDPPolicyWorkerBase": FSDPPolicyWorkerBase,
                "PolicyWorker": FSDPPolicyWorkerBase,
            },
            "skyrl.train.config": {"SkyRLTrainConfig": object},
            "skyrl.train.entrypoints.main_base": {"BasePPOExp": BasePPOExp},
            "skyrl.train.utils.utils": {"initialize_ray": None, "validate_cfg": None},
        },
    )
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    (code,) = page_code("skyrl.md")
    yield run_page(monkeypatch, "rhythm_skyrl", code)
    dist.destroy_process_group()


def config(packed=False, strategy="fsdp", sequence_parallel_size=1):
    policy = types.SimpleNamespace(sequence_parallel_size=sequence_parallel_size)
    return types.SimpleNamespace(
        remove_microbatch_padding=packed, policy=policy, trainer=types.SimpleNamespace(strategy=strategy)
    )


def batch(seed=0):
    """Four rows, padded on the left; an environment wrote the tokens 8 to 11 of the second response."""
    prompts, responses = ragged([5, 3, 9, 4], [40, 44, 33, 21], len(WORDS), seed)
    rows = [torch.cat(pair) for pair in zip(prompts, responses)]
    padded = lambda rows: pad_sequence(rows, batch_first=True, padding_side="left")  # noqa: E731
    tokens, live = padded(rows), padded([torch.ones_like(row) for row in rows])
    response = padded([torch.ones_like(row) for row in responses])
    loss_mask = response.clone()
    loss_mask[1, 8:12] = 0
    advantages = torch.tensor([[1.0], [-0.5], [0.25], [2.0]]) * response
    named = {"sequences": tokens, "attention_mask": live, "loss_mask": loss_mask, "advantages": advantages}
    return Batch(named, {"response_length": response.shape[1]})


def trained(module, packed=False, **changed):
    """A worker after the old-log-prob pass and the training of a batch; and the batch."""
    module.SETTINGS = replace(module.SETTINGS, **changed)
    worker = module.RhythmPolicyWorker(config(packed), build_model())
    worker.init_model("a model")
    data = batch()
    data["action_log_probs"] = worker.forward(data)
    statuses = worker.forward_backward(data)
    return worker, data, statuses


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mode", ["coupled", "local"])
def test_the_loss_gets_advantages_times_gamma_of_full_maps(skyrl, packed, mode):
    worker, data, statuses = trained(skyrl, packed, mode=mode)
    tokens, live = data["sequences"], data["attention_mask"].bool()
    length = data.metadata["response_length"]
    mask = torch.zeros_like(live)
    mask[:, -length:] = data["loss_mask"].bool()
    gamma = gamma_from_maps(build_model(), tokens, live, mask, worker.credit.groups, skyrl.SETTINGS)[:, -length:]
    assert ((gamma > 1) & data["loss_mask"].bool()).sum() > 20
    torch.testing.assert_close(torch.cat(worker.met), data["advantages"] * gamma)
    bonus = [((g - 1) * m).sum() / m.sum() for g, m in zip(gamma, data["loss_mask"])]
    torch.testing.assert_close([s["rhythm_bonus"] for s in statuses], [b.item() for b in bonus])
    assert worker.seen
    tail = live.clone()
    tail[:, :-length] = False  # what the first forward knows of responses
    first = list(worker.order[:2])
    groups = groups_from_maps(build_model(), tokens[first], live[first], tail[first], skyrl.SETTINGS)
    assert (list(worker.credit.groups.local), list(worker.credit.groups.global_)) == groups


def test_gamma_of_one_leaves_every_bit(skyrl):
    worker, data, _ = trained(skyrl, gamma_amp=1.0)
    assert torch.equal(torch.cat(worker.met), data["advantages"])
    plain = FSDPPolicyWorkerBase(config(), build_model())
    plain.init_model("a model")
    assert torch.equal(plain.forward(batch()), data["action_log_probs"])
    plain.forward_backward(data)
    for mine, theirs in zip(worker.model.parameters(), plain.model.parameters()):
        assert torch.equal(mine.grad, theirs.grad)


def test_a_batch_replaces_the_one_before_and_is_trained_for_several_epochs(skyrl):
    worker, _, _ = trained(skyrl)
    data = batch(seed=1)
    data["action_log_probs"] = worker.forward(data)
    assert len(worker.measures) == 4
    worker.forward_backward(data)
    worker.forward_backward(data)
    torch.testing.assert_close(worker.met[4:8], worker.met[8:12], rtol=0, atol=0)


def test_a_row_that_was_not_measured_stops_the_first_step_unless_it_is_padding(skyrl):
    worker, data, _ = trained(skyrl)
    other = batch(seed=1)
    other["action_log_probs"] = data["action_log_probs"]
    with pytest.raises(RuntimeError, match="recompute_old_logprobs_per_minibatch=true"):
        worker.forward_backward(other)
    other["loss_mask"] = other["loss_mask"] * 0
    worker.forward_backward(other)
    torch.testing.assert_close(torch.cat(worker.met[-4:]), other["advantages"])


def test_a_worker_that_has_moved_stops_the_first_step(skyrl):
    worker = skyrl.RhythmPolicyWorker(config(), build_model())
    worker.init_model("a model")
    data = batch()
    data["action_log_probs"] = worker.forward(data)
    worker._forward_backward_micro = types.MethodType(FSDPPolicyWorkerBase._forward_backward_micro, worker)
    with pytest.raises(RuntimeError, match="does not call _forward_backward_micro"):
        worker.forward_backward(data)


def test_a_loss_of_one_ratio_a_response_is_refused_in_the_first_step(skyrl):
    skyrl.SETTINGS = replace(skyrl.SETTINGS, mode="local")
    worker = skyrl.RhythmPolicyWorker(config(), build_model())
    worker.policy_loss_fn = sequence_ratio_loss
    worker.init_model("a model")
    data = batch()
    data["action_log_probs"] = worker.forward(data)
    with pytest.raises(RuntimeError, match="does not see which tokens credit chose"):
        worker.forward_backward(data)


def test_what_it_cannot_honour_is_refused_by_name(skyrl):
    with pytest.raises(ValueError, match=r"trainer.policy.sequence_parallel_size must be 1, got 2"):
        skyrl.RhythmPolicyWorker(config(sequence_parallel_size=2), build_model()).init_model("a model")
    with pytest.raises(ValueError, match=r"trainer.strategy must be fsdp, got megatron"):
        skyrl.RhythmExp(config(strategy="megatron"))._setup_trainer()
    for changed in ({"mode": "entropy"}, {"regroup_steps": 5}):
        skyrl.SETTINGS = replace(skyrl.SETTINGS, **changed)
        with pytest.raises(ValueError, match="SETTINGS must be of mode local"):
            skyrl.RhythmPolicyWorker(config(), build_model()).init_model("a model")
        skyrl.SETTINGS = replace(skyrl.SETTINGS, mode="coupled", regroup_steps=0)


def test_the_experiment_starts_our_worker_and_the_log_says_so(skyrl, capsys, caplog):
    assert skyrl.RhythmExp(config())._setup_trainer() is skyrl.RhythmPolicyWorker
    skyrl.RhythmPolicyWorker(config(), build_model()).init_model("a model")
    said = capsys.readouterr().err + caplog.text
    assert "rhythm credit is on in SkyRL's FSDP policy worker" in said
