"""The page on AReaL: its actor, over a stand-in of theirs, gives advantages times gamma of full maps."""

from __future__ import annotations

import sys
import types
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from ...probe import flash_standin
from ..toy import WORDS, build_model
from .page import gamma_from_maps, install, page_code, ragged, run_page

PACKAGE = ("areal", "1.0.4")
_ENGINE, _DATA, _ARGS = "areal/engine/fsdp_engine.py", "areal/utils/data.py", "areal/api/cli_args.py"
NAMES = [
    ("areal/engine/__init__.py", "__getattr__", ("name",)),
    ("areal/trainer/rl_trainer.py", "PPOTrainer._create_train_engine", ("self", "actor_config", "alloc")),
    (_ENGINE, "FSDPPPOActor", ("self", "config")),
    (_ENGINE, "FSDPPPOActor.actor", None),
    (_ENGINE, "FSDPEngine.initialize", ("self", "addr", "ft_spec")),
    (_ENGINE, "FSDPEngine.forward_backward_batch", ("self", "mb_list", "process_output_fn", "forward_only")),
    (_ENGINE, "FSDPEngine.forward_batch", ("self", "input_", "output_seqlens", "aggregate_fn")),
    (_ENGINE, "FSDPEngine.train_batch", ("self", "input_", "loss_fn", "loss_weight_fn")),
    (_ENGINE, "FSDPEngine.get_version", ("self",)),
    (_ENGINE, "FSDPEngine.model", None),
    (_ENGINE, "FSDPEngine.config", None),
    (_ENGINE, "FSDPEngine.dp_group", None),
    (_ENGINE, "FSDPEngine.parallel_helper", None),
    ("areal/engine/fsdp_utils/parallel.py", "ParallelHelper.tp_size", ("self",)),
    ("areal/engine/fsdp_utils/parallel.py", "ParallelHelper.sp_size", ("self",)),
    (_DATA, "MicroBatchItem.padded_mb", None),
    (_DATA, "MicroBatchItem.padding_length", None),
    (_DATA, "MicroBatchList.forward_indices", None),
    ("areal/trainer/ppo/actor.py", "PPOActor", ("self", "config", "engine")),
    ("areal/trainer/ppo/actor.py", "PPOActor.engine", None),
    ("areal/trainer/ppo/actor.py", "PPOActor._compute_logp", ("self", "data")),
    ("areal/trainer/ppo/actor.py", "PPOActor._compute_advantages", ("self", "data")),
    ("areal/trainer/ppo/actor.py", "grpo_loss_fn", ("logprobs", "entropy", "input_data")),
    (_ARGS, "PPOActorConfig.should_compute_prox_logp", ("self",)),
    (_ARGS, "PPOActorConfig.importance_sampling_level", None),
    (_ARGS, "PPOActorConfig.recompute_logprob", None),
    (_ARGS, "TrainEngineConfig.enable_tree_training", None),
    (_ARGS, "TrainEngineConfig.optimizer", None),
]


class MicroBatchItem(NamedTuple):
    orig_mb: dict
    padded_mb: dict
    padding_length: int


class MicroBatchList:
    """Two micro-batches, packed, the longest rows first, each padded by a sequence of its own."""

    def __init__(self, data):
        lengths = data["attention_mask"].sum(1)
        self.forward_indices = lengths.argsort(descending=True, stable=True).tolist()
        half = (len(lengths) + 1) // 2
        self.items = [
            self.packed(data, lengths, rows) for rows in (self.forward_indices[:half], self.forward_indices[half:])
        ]

    def packed(self, data, lengths, rows):
        def pack(x):
            return torch.cat([x[row, : lengths[row]] for row in rows])

        per_token = ("input_ids", "loss_mask", "advantages", "prox_logp")
        mb = {name: pack(data[name]) for name in per_token if name in data}
        mb["position_ids"] = torch.cat([torch.arange(lengths[row]) for row in rows])
        padding = -len(mb["input_ids"]) % 16
        padded = {name: F.pad(x, (0, padding))[None] for name, x in mb.items()}
        padded["position_ids"][0, len(mb["input_ids"]) :] = torch.arange(padding)
        mb["cu_seqlens"] = ends = torch.cat([torch.zeros(1), lengths[rows].cumsum(0)]).int()
        if padding:
            ends = torch.cat([ends, ends[-1:] + padding])
        longest = int(ends.diff().max())
        padded |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
        padded |= {"attention_mask": {"full_attention": None, "sliding_attention": None}, "use_cache": False}
        return MicroBatchItem(mb, padded, padding)

    def __iter__(self):
        return iter(self.items)


class FSDPEngine:
    def __init__(self, config):
        self.config = config

    def initialize(self, addr, ft_spec, *args, **kwargs):
        self.model, self.dp_group = self.config.made, None
        self.parallel_helper = types.SimpleNamespace(tp_size=self.config.tp_size, sp_size=self.config.sp_size)

    def get_version(self):
        return 0

    def eval(self):
        self.model.eval()

    def forward_backward_batch(self, mb_list, process_output_fn, forward_only=False):
        for mb in mb_list:
            inputs = {name: x for name, x in mb.padded_mb.items() if name not in ("advantages", "prox_logp")}
            loss = process_output_fn(self.model(**inputs).logits.squeeze(0), {"mb": mb})
            if not forward_only:
                loss.backward()

    def log_probs(self, logits, mb):
        labels = mb.padded_mb["input_ids"][0].roll(-1)
        return logits.log_softmax(-1).gather(1, labels[:, None])[: len(labels) - mb.padding_length, 0]

    def train_batch(self, input_, loss_fn, loss_weight_fn):
        def process_output(logits, context):
            log_probs, mb = self.log_probs(logits, context["mb"]), context["mb"].orig_mb
            named = {"vocab_min_logits": logits.min(-1).values, "vocab_max_logits": logits.max(-1).values}
            return loss_fn(log_probs, torch.zeros_like(log_probs), mb, **named) * loss_weight_fn(mb)

        self.forward_backward_batch(MicroBatchList(input_), process_output)

    def forward(self, input_, output_seqlens=None, aggregate_fn=torch.cat):
        mb_list, outputs = MicroBatchList(input_), []

        def process_output(logits, context):
            outputs.append(self.log_probs(logits, context["mb"]))

        self.forward_backward_batch(mb_list, process_output, forward_only=True)
        lengths = input_["attention_mask"].sum(1)
        result = torch.zeros(input_["input_ids"].shape)
        for row, found in zip(
            mb_list.forward_indices, aggregate_fn(outputs).split(lengths[mb_list.forward_indices].tolist())
        ):
            result[row, : len(found)] = found
        return result


class FSDPPPOActor(FSDPEngine):
    def __init__(self, config):
        super().__init__(config)
        self.actor = PPOActor(config, self)

    @torch.no_grad()
    def compute_logp(self, data):
        return self.actor._compute_logp(data)

    @torch.no_grad()
    def compute_advantages(self, data):
        return self.actor._compute_advantages(data)


class PPOActor:
    def __init__(self, config, engine):
        self.config, self.engine = config, engine

    def _compute_logp(self, data):
        self.engine.eval()
        return self.engine.forward(input_=data, aggregate_fn=lambda xs: torch.cat(xs, dim=-1))

    def _compute_advantages(self, data):
        loss_mask = data["loss_mask"].float().roll(-1, dims=-1)
        data["advantages"] = data["rewards"][:, None] * loss_mask
        data["returns"] = data["advantages"].clone()
        data["loss_mask"] = loss_mask
        return data

    def _ppo_update(self, data):
        self.engine.train_batch(data, loss_fn=self.config.loss, loss_weight_fn=lambda mb: mb["loss_mask"].sum())


def token_ratios(logprobs, entropy, input_data, vocab_min_logits=None, vocab_max_logits=None):
    ratio = (logprobs - input_data["prox_logp"]).exp()
    return -(ratio * input_data["advantages"] * input_data["loss_mask"]).sum()


def response_ratios(logprobs, entropy, input_data, vocab_min_logits=None, vocab_max_logits=None):
    """One ratio a response, and the mean of its advantages."""
    total = 0.0
    for start, end in pairwise(input_data["cu_seqlens"].tolist()):
        mask = input_data["loss_mask"][start:end]
        difference = (logprobs - input_data["prox_logp"])[start:end]
        ratio = ((difference * mask).sum() / mask.sum()).exp()
        total = total - ratio * (input_data["advantages"][start:end] * mask).sum()
    return total


@pytest.fixture
def areal(monkeypatch):
    """The page's module, in a process group of one."""
    install(
        monkeypatch,
        {
            "areal.engine": {"FSDPPPOActor": FSDPPPOActor},
            "areal.engine.fsdp_engine": {"FSDPPPOActor": FSDPPPOActor},
            "areal.trainer.ppo.actor": {"PPOActor": PPOActor},
        },
    )
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    (code,) = page_code("areal.md")
    yield run_page(monkeypatch, "rhythm_areal", code)
    dist.destroy_process_group()


def config(recomputes=True, **changed):
    values = {
        "should_compute_prox_logp": lambda: recomputes,
        "importance_sampling_level": "token",
        "enable_tree_training": False,
        "optimizer": "adam",
        "loss": token_ratios,
        "tp_size": 1,
        "sp_size": 1,
        "made": build_model(),
        **changed,
    }
    return types.SimpleNamespace(**values)


def batch(seed=0):
    """Four rows, padded on the right; an environment wrote the tokens 8 to 11 of the second response."""
    prompts, responses = ragged([5, 3, 9, 4], [40, 44, 33, 21], len(WORDS), seed)
    rows = [torch.cat(pair) for pair in zip(prompts, responses)]
    data = {"rewards": torch.tensor([1.0, -0.5, 0.25, 2.0])}
    data["input_ids"] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    column = torch.arange(data["input_ids"].shape[1])
    ends, starts = (torch.tensor([len(x) for x in each])[:, None] for each in (rows, prompts))
    data["attention_mask"] = (column < ends).long()
    data["loss_mask"] = ((column >= starts) & (column < ends)).int()
    data["loss_mask"][1, 3 + 8 : 3 + 12] = 0
    return data


def engine(module, **changed):
    made = module.FSDPPPOActor if changed.pop("plain", False) else module.RhythmFSDPPPOActor
    made = made(config(**changed))
    made.initialize(None, object())
    return made


def advantages(actor, data):
    with flash_standin.installed(actor.model):
        data["prox_logp"] = actor.compute_logp(data)
    return actor.compute_advantages(dict(data))["advantages"]


@pytest.mark.parametrize("sign", ["both", "negative"])
def test_the_advantages_are_times_gamma_of_full_maps(areal, sign):
    areal.SETTINGS = areal.rk.RhythmSettings(mode="coupled", sign=sign)
    actor, data = engine(areal), batch()
    found = advantages(actor, data)
    mask = data["loss_mask"].bool()
    gamma = gamma_from_maps(
        build_model(), data["input_ids"], data["attention_mask"].bool(), mask, actor.credit.groups, areal.SETTINGS
    )
    assert ((gamma != 1) & mask).sum() > 20
    if sign == "negative":
        gamma[[0, 2, 3]] = 1.0
    for row in range(4):
        for t in range(1, mask.shape[1]):  # column t - 1 is of token t
            expected = data["rewards"][row] * mask[row, t] * gamma[row, t]
            assert found[row, t - 1] == pytest.approx(expected.item())
    assert (found[:, -1] == 0).all()


def test_log_probs_and_returns_stay_and_gamma_of_one_leaves_every_bit(areal):
    plain, data = engine(areal, plain=True), batch()
    expected = advantages(plain, data)
    for amplitude in (1.0, 1.5):
        areal.SETTINGS = areal.rk.RhythmSettings(mode="coupled", gamma_amp=amplitude)
        actor, again = engine(areal), batch()
        found = advantages(actor, again)
        assert torch.equal(again["prox_logp"], data["prox_logp"])
        assert torch.equal(found, expected) == (amplitude == 1.0)
    with flash_standin.installed(actor.model):
        actor.compute_logp(again)
    assert torch.equal(actor.compute_advantages(dict(again))["returns"], expected)


def update(actor):
    data = batch()
    with flash_standin.installed(actor.model):
        data["prox_logp"] = actor.compute_logp(data)
    actor.actor._ppo_update(actor.compute_advantages(data))  # the stand-in of flash attention has no gradient


def test_a_loss_of_one_ratio_a_response_is_refused_in_the_first_step(areal):
    actor = engine(areal)
    update(actor)
    assert actor.seen
    with pytest.raises(RuntimeError, match="does not see which tokens credit chose"):
        update(engine(areal, loss=response_ratios))


def test_the_trainer_makes_our_actor_and_the_log_says_so(areal, capsys, caplog):
    assert sys.modules["areal.engine"].FSDPPPOActor is areal.RhythmFSDPPPOActor
    engine(areal)
    assert "rhythm credit is on in AReaL's FSDP actor" in capsys.readouterr().err + caplog.text


def test_a_reference_model_is_left_alone(areal, capsys):
    reference, data = engine(areal, optimizer=None, importance_sampling_level="sequence"), batch()
    plain = engine(areal, plain=True)
    with flash_standin.installed(reference.model), flash_standin.installed(plain.model):
        assert torch.equal(reference.compute_logp(data), plain.compute_logp(data))
    assert reference.credit is None
    assert capsys.readouterr().err == ""


def test_advantages_of_another_batch_stop_the_first_step(areal):
    actor = engine(areal)
    with pytest.raises(RuntimeError, match="whose log-probs this worker did not recompute"):
        actor.compute_advantages(batch())
    with flash_standin.installed(actor.model):
        actor.compute_logp(batch())
    with pytest.raises(RuntimeError, match="whose log-probs this worker did not recompute"):
        actor.compute_advantages(batch(seed=1))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"recomputes": False}, r"actor.recompute_logprob .* must be true, .*, got False"),
        ({"importance_sampling_level": "sequence"}, "actor.importance_sampling_level must be token, got sequence"),
        ({"enable_tree_training": True}, "actor.enable_tree_training must be false, got True"),
        ({"tp_size": 2}, "tensor parallel size must be 1, got 2"),
        ({"sp_size": 4}, "context parallel size must be 1, got 4"),
    ],
)
def test_what_it_cannot_honour_is_refused_by_name(areal, changed, message):
    with pytest.raises(ValueError, match=message):
        engine(areal, **changed)


def test_modes_without_attention_are_refused(areal):
    areal.SETTINGS = areal.rk.RhythmSettings(mode="entropy")
    with pytest.raises(ValueError, match=r"SETTINGS.mode must be local, global or coupled, got entropy"):
        engine(areal)
