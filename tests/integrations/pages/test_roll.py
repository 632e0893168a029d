"""The page on ROLL: its worker, over a stand-in of theirs, gives the loss advantages times gamma of full maps."""

from __future__ import annotations

import types
from enum import Enum, auto

import pytest
import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence

from ..toy import WORDS, build_model
from .page import gamma_from_maps, install, page_code, ragged, run_page

PACKAGE = ("git+https://github.com/alibaba/ROLL", "7f9d4d3873a87679c8d070085a4bd3bdeea7e589")  # v0.3.0
_STRATEGY, _PG = "roll/distributed/strategy/fsdp2_strategy.py", "roll/pipeline/rlvr/actor_pg_worker.py"
_WORKER, _CONFIG = "roll/pipeline/base_worker.py", "roll/configs/worker_config.py"
NAMES = [
    ("roll/distributed/scheduler/decorator.py", "Dispatch.ONE_TO_ALL", None),
    ("roll/distributed/scheduler/decorator.py", "register", ("dispatch_mode",)),
    ("roll/distributed/scheduler/protocol.py", "DataProto.batch", None),
    ("roll/distributed/scheduler/protocol.py", "DataProto.meta_info", None),
    (_PG, "ActorPGWorker", None),
    (_PG, "ActorPGWorker.loss_func", ("self", "data", "output_tensor")),
    (_PG, "ActorPGWorker._cached_metrics", None),
    (_WORKER, "ActorWorker.initialize", ("self", "pipeline_config")),
    (_WORKER, "ActorWorker.strategy", None),
    (_WORKER, "ActorWorker.train_step", ("self", "data")),
    ("roll/distributed/executor/worker.py", "Worker.rank_info", None),
    ("roll/distributed/executor/worker.py", "Worker.worker_config", None),
    ("roll/distributed/executor/worker.py", "RankInfo.cp_size", None),
    ("roll/distributed/executor/worker.py", "RankInfo.rank", None),
    (_STRATEGY, "FSDP2TrainStrategy.train_step", ("self", "batch", "loss_func", "no_sync")),
    (
        _STRATEGY,
        "FSDP2InferStrategy._fsdp2_forward",
        ("self", "input_ids", "attention_mask", "position_ids", "forward_args"),
    ),
    (_STRATEGY, "FSDP2InferStrategy.unwrap_model", ("self",)),
    (_CONFIG, "WorkerConfig.worker_cls", None),
    (_CONFIG, "WorkerConfig.use_dynamic_batching_in_train", None),
    (_CONFIG, "WorkerConfig.use_sequence_packing", None),
    (_CONFIG, "StrategyArguments.strategy_name", None),
    ("roll/configs/base_config.py", "PPOConfig.ppo_epochs", None),
]


class Dispatch(Enum):
    ONE_TO_ALL = auto()


def register(dispatch_mode=None, **options):
    def decorator(function):
        function.dispatch_mode = dispatch_mode
        return function

    return decorator


class DataProto:
    def __init__(self, batch, meta_info):
        self.batch, self.meta_info = batch, meta_info

    def make_iterator(self, mini_batch_size, epochs):
        for first in range(0, len(self.batch["input_ids"]), mini_batch_size):
            rows = slice(first, first + mini_batch_size)
            yield DataProto({name: x[rows] for name, x in self.batch.items()}, self.meta_info)


class FSDP2TrainStrategy:
    def __init__(self, worker):
        self.worker, self.model = worker, worker.worker_config.made

    def unwrap_model(self):
        return self.model

    def _fsdp2_forward(self, input_ids, attention_mask, position_ids, forward_args):
        forward_args.setdefault("use_cache", False)
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **forward_args
        ).logits

    def forward(self, data):
        named = {name: data.batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        return self._fsdp2_forward(**named, forward_args={})

    def forward_step(self, batch, forward_func):
        with torch.no_grad():
            return torch.cat([forward_func(data, self.forward(data)) for data in batch.make_iterator(2, 1)])

    def train_step(self, batch, loss_func, no_sync=False):
        metrics = {}
        for data in batch.make_iterator(mini_batch_size=2, epochs=1):
            loss, reduced = loss_func(data, self.forward(data))
            loss.backward()
            for name, value in reduced.items():
                metrics.setdefault(name, []).append(value)
        return metrics

    def op_compute_log_probs(self, logits, input_ids, attention_mask):
        found = logits[:, :-1].log_softmax(-1).gather(2, input_ids[:, 1:, None])[..., 0]
        return found * attention_mask[:, 1:]


class ActorPGWorker:
    def __init__(self, worker_config):
        self.worker_config = worker_config
        self.rank_info = types.SimpleNamespace(rank=0, cp_size=worker_config.cp_size)
        self.met = []  # the advantages that the loss read

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def initialize(self, pipeline_config):
        self.strategy = FSDP2TrainStrategy(self)

    def train_step(self, data):
        return self.strategy.train_step(batch=data, loss_func=self.loss_func)

    def compute_log_probs(self, data):
        def forward_func(data, logits):
            return self.strategy.op_compute_log_probs(
                logits=logits, input_ids=data.batch["input_ids"], attention_mask=data.batch["response_mask"]
            )

        return self.strategy.forward_step(batch=data, forward_func=forward_func)

    def loss_func(self, data, output_tensor):
        mask, advantages = data.batch["final_response_mask"], data.batch["advantages"]
        log_probs = self.strategy.op_compute_log_probs(
            logits=output_tensor, input_ids=data.batch["input_ids"], attention_mask=data.batch["response_mask"]
        )
        self._cached_metrics = {"log_probs": log_probs}
        self.met.append(advantages)
        ratio = self.ratio(log_probs - data.batch["old_log_probs"], mask)
        return -(ratio * advantages * mask).sum() / mask.sum().clamp(min=1), {"actor/kl_loss": 0.0}

    def ratio(self, difference, mask):
        return difference.exp()


@pytest.fixture
def roll(monkeypatch):
    """The page's module, in a process group of one."""
    install(
        monkeypatch,
        {
            "roll.distributed.scheduler.decorator": {"Dispatch": Dispatch, "register": register},
            "roll.pipeline.rlvr.actor_pg_worker": {"ActorPGWorker": ActorPGWorker},
        },
    )
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    (code,) = page_code("roll.md")
    yield run_page(monkeypatch, "rhythm_roll", code)
    dist.destroy_process_group()


def started(made, ppo_epochs=1, **changed):
    values = {
        "strategy_args": types.SimpleNamespace(strategy_name=changed.pop("strategy_name", "fsdp2_train")),
        "use_dynamic_batching_in_train": False,
        "use_sequence_packing": False,
        "cp_size": 1,
        "made": build_model(),
        **changed,
    }
    worker = made(types.SimpleNamespace(**values))
    worker.initialize(types.SimpleNamespace(ppo_epochs=ppo_epochs))
    return worker


def batch(seed=0):
    """Four rows, padded on both sides; an environment wrote the tokens 8 to 11 of the second response."""
    prompts, responses = ragged([5, 3, 9, 4], [40, 44, 33, 21], len(WORDS), seed)

    def joined(left, right):
        left = pad_sequence(left, batch_first=True, padding_side="left")
        return torch.cat([left, pad_sequence(right, batch_first=True)], dim=1)

    ones = [torch.ones_like(row) for row in responses]
    live = joined([torch.ones_like(row) for row in prompts], ones)
    response_mask = joined([torch.zeros_like(row) for row in prompts], ones)
    response_mask[1, 9 + 8 : 9 + 12] = 0
    found = {
        "input_ids": joined(prompts, responses),
        "attention_mask": live,
        "position_ids": (live.cumsum(1) - 1).clamp(min=0),
        "response_mask": response_mask,
        "final_response_mask": response_mask[:, 1:].clone(),
        "advantages": torch.tensor([[1.0], [-0.5], [0.25], [2.0]]) * response_mask[:, 1:],
    }
    return DataProto(found, {"global_step": 0})


def trained(worker, data=None):
    data = data or batch()
    data.batch["old_log_probs"] = worker.compute_log_probs(data)
    return worker.train_step(data)


def test_the_loss_reads_advantages_times_gamma_of_full_maps(roll):
    worker, data = started(roll.RhythmActorPGWorker), batch()
    metrics = trained(worker, data)
    mask = data.batch["response_mask"].bool()
    live = data.batch["attention_mask"].bool()
    gamma = gamma_from_maps(build_model(), data.batch["input_ids"], live, mask, worker.credit.groups, roll.SETTINGS)
    assert ((gamma != 1) & mask).sum() > 20
    found = torch.cat(worker.met)
    for row in range(4):
        for t in range(1, mask.shape[1]):
            expected = data.batch["advantages"][row, t - 1] * gamma[row, t]
            assert found[row, t - 1] == pytest.approx(expected.item())
    means = [gamma[part][mask[part]].mean().item() for part in (slice(0, 2), slice(2, 4))]
    assert metrics["actor/rhythm_gamma_mean"] == pytest.approx(means)
    assert worker.seen


def test_gamma_of_one_leaves_every_bit(roll):
    data = batch()
    plain = started(ActorPGWorker)
    trained(plain, data)
    for amplitude in (1.0, 1.5):
        roll.SETTINGS = roll.rk.RhythmSettings(mode="coupled", gamma_amp=amplitude)
        worker = started(roll.RhythmActorPGWorker)
        trained(worker, batch())
        same = [
            torch.equal(a.grad, b.grad)
            for a, b in zip(worker.strategy.model.parameters(), plain.strategy.model.parameters())
        ]
        assert all(same) == (amplitude == 1.0)


def test_the_old_log_prob_pass_is_left_alone(roll):
    worker, data = started(roll.RhythmActorPGWorker), batch()
    assert torch.equal(worker.compute_log_probs(data), started(ActorPGWorker).compute_log_probs(data))
    assert worker.credit.groups is None
    with pytest.raises(RuntimeError, match="no forward was measured before this loss"):
        worker.loss_func(data, torch.zeros(1))


def test_a_loss_of_one_ratio_a_response_is_refused_in_the_first_step(roll):
    worker = started(roll.RhythmActorPGWorker)
    worker.ratio = lambda difference, mask: (difference * mask).sum(1, keepdim=True).exp()
    with pytest.raises(RuntimeError, match="does not see which tokens credit chose"):
        trained(worker)


def test_rows_that_the_loss_leaves_out_are_no_reason_to_stop(roll):
    worker, data = started(roll.RhythmActorPGWorker), batch()
    data.batch["final_response_mask"][2:] = 0
    data.batch["final_response_mask"][0] = 0
    trained(worker, data)
    assert worker.seen


@pytest.mark.parametrize("rows", [slice(0, 2), slice(2, 4)])
def test_a_micro_batch_without_a_response_has_the_same_metrics(roll, rows):
    """ROLL stacks a metric over micro-batches and workers, and cannot where one of them lacks it."""
    worker, data = started(roll.RhythmActorPGWorker), batch()
    data.batch["response_mask"][rows] = data.batch["final_response_mask"][rows] = 0
    assert {len(values) for values in trained(worker, data).values()} == {2}


def test_ray_is_still_told_how_to_call_it_and_the_log_says_so(roll, capsys, caplog):
    assert roll.RhythmActorPGWorker.initialize.dispatch_mode is Dispatch.ONE_TO_ALL
    started(roll.RhythmActorPGWorker)
    assert "rhythm credit is on in ROLL's policy-gradient worker" in capsys.readouterr().err + caplog.text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"strategy_name": "megatron_train"}, "strategy_name must be fsdp2_train, got megatron_train"),
        ({"cp_size": 2}, "actor_train.model_args.ulysses_size must be 1, got 2"),
        ({"ppo_epochs": 2}, "ppo_epochs must be 1, got 2"),
        ({"use_dynamic_batching_in_train": True}, "actor_train.use_dynamic_batching_in_train must be false, got True"),
        ({"use_sequence_packing": True}, "actor_train.use_sequence_packing must be false, got True"),
    ],
)
def test_what_it_cannot_honour_is_refused_by_name(roll, changed, message):
    with pytest.raises(ValueError, match=message):
        started(roll.RhythmActorPGWorker, **changed)


def test_modes_without_attention_are_refused(roll):
    roll.SETTINGS = roll.rk.RhythmSettings(mode="random")
    with pytest.raises(ValueError, match=r"SETTINGS.mode must be local, global or coupled, got random"):
        started(roll.RhythmActorPGWorker)
