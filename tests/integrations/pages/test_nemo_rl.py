"""The page on NeMo-RL: its worker, over a stand-in of theirs, gives the loss advantages times gamma of full maps."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence

from ..toy import WORDS, build_model
from .page import gamma_from_maps, groups_from_maps, install, page_code, ragged, run_page

PACKAGE = ("git+https://github.com/NVIDIA-NeMo/RL", "7ea279abfbeb698b092856d0dab61e7cf39bc909")
_WORKER = "nemo_rl/models/policy/workers/dtensor_policy_worker_v2.py"
_TRAIN = "nemo_rl/models/automodel/train.py"
NAMES = [
    (_WORKER, "DTensorPolicyWorkerV2Impl", ("self", "config")),
    (
        _WORKER,
        "DTensorPolicyWorkerV2Impl.train",
        ("self", "data", "loss_fn", "eval_mode", "gbs", "mbs", "check_dim_skip_keys"),
    ),
    *(
        (_WORKER, f"DTensorPolicyWorkerV2Impl.{name}", None)
        for name in ("cfg", "dp_size", "enable_seq_packing", "model")
    ),
    (_TRAIN, "forward_with_post_processing_fn", ("model", "post_processing_fn", "processed_mb")),
    (_TRAIN, "model_forward", ("model", "processed_inputs")),
    (_TRAIN, "automodel_forward_backward", ("model", "data_iterator", "post_processing_fn")),
    ("nemo_rl/models/automodel/data.py", "ProcessedMicrobatch.data_dict", None),
    ("nemo_rl/models/automodel/data.py", "ProcessedInputs.input_ids", None),
    ("nemo_rl/models/policy/utils.py", "get_runtime_env_for_policy_worker", ("policy_worker_name",)),
    *(
        ("nemo_rl/algorithms/loss/loss_functions.py", f"ClippedPGLossDataDict.{name}", None)
        for name in ("advantages", "token_mask", "sample_mask")
    ),
    ("nemo_rl/algorithms/loss/loss_functions.py", "ClippedPGLossFn.__call__", ("self", "next_token_logprobs", "data")),
    ("nemo_rl/algorithms/grpo.py", "Policy", None),
    ("nemo_rl/algorithms/grpo.py", "setup", ("master_config", "tokenizer", "dataset", "val_dataset", "processor")),
    ("nemo_rl/models/policy/lm_policy.py", "Policy", ("self", "cluster", "config", "tokenizer")),
    ("nemo_rl/distributed/batched_data_dict.py", "BatchedDataDict.size", ("self",)),
    ("nemo_rl/distributed/ray_actor_environment_registry.py", "ACTOR_ENVIRONMENT_REGISTRY", None),
    ("nemo_rl/distributed/virtual_cluster.py", "PY_EXECUTABLES", None),
    ("nemo_rl/distributed/virtual_cluster.py", "PY_EXECUTABLES.AUTOMODEL", None),
    ("examples/run_grpo.py", "main", ()),
]


class BatchedDataDict(dict):
    """NeMo-RL's batch, as far as training needs it."""

    @property
    def size(self):
        return len(self["input_ids"])

    def slice(self, start, end):
        return BatchedDataDict({name: tensor[start:end] for name, tensor in self.items()})


@dataclass
class ProcessedInputs:
    input_ids: torch.Tensor
    seq_len: int
    attention_mask: Any = None
    position_ids: Any = None
    flash_attn_kwargs: dict = field(default_factory=dict)


@dataclass
class ProcessedMicrobatch:
    data_dict: BatchedDataDict
    processed_inputs: ProcessedInputs
    original_batch_size: int
    original_seq_len: int


def process(rows, packed):
    """Rows padded on the right, all of whose places are attended to; or packed, and filled up to a length."""
    tokens = rows["input_ids"]
    if not packed:
        positions = torch.arange(tokens.shape[1]).repeat(len(tokens), 1)
        return ProcessedInputs(tokens, tokens.shape[1], torch.ones_like(tokens).bool(), positions)
    lengths = rows["input_lengths"].tolist()
    places = [torch.arange(n) for n in lengths]
    filler = torch.zeros(9, dtype=torch.long)
    flat = torch.cat([*(row[:n] for row, n in zip(tokens, lengths)), filler + 1])[None]
    return ProcessedInputs(flat, flat.shape[1], None, torch.cat([*places, filler])[None], {"cu_seqlens_q": lengths})


def next_token_logprobs(logits, tokens):
    return logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)


class LossPostProcessor:
    def __init__(self, loss_fn, enable_seq_packing):
        self.loss_fn, self.enable_seq_packing = loss_fn, enable_seq_packing

    def __call__(self, logits, data_dict, processed_inputs, global_valid_seqs, global_valid_toks, sequence_dim=1):
        counts = {"global_valid_seqs": global_valid_seqs, "global_valid_toks": global_valid_toks}
        if not self.enable_seq_packing:
            log_probs = next_token_logprobs(logits, data_dict["input_ids"])
            return self.loss_fn(data=data_dict, **counts, next_token_logprobs=log_probs)
        total, start = 0, 0
        for row, length in enumerate(data_dict["input_lengths"].tolist()):
            one = data_dict.slice(row, row + 1)
            one = BatchedDataDict({k: v[:, :length] if v.dim() > 1 else v for k, v in one.items()})
            log_probs = next_token_logprobs(logits[:, start : start + length], one["input_ids"])
            loss, metrics = self.loss_fn(data=one, **counts, next_token_logprobs=log_probs)
            total, start = total + loss, start + length
        return total, metrics


class ClippedPGLossFn:
    loss_type, input_type = "token_level", "logprob"

    def __init__(self):
        self.met = []  # the advantages that it was given, a tensor a row

    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        mask = data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)
        advantages = data["advantages"][:, 1:]
        self.met += data["advantages"].unbind()
        ratio = self.ratio(next_token_logprobs, next_token_logprobs.detach(), mask)
        return -(torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) * mask).sum(), {}

    def ratio(self, log_probs, before, mask):
        return (log_probs - before).exp()


class SequenceRatioLossFn(ClippedPGLossFn):
    def ratio(self, log_probs, before, mask):
        return ((log_probs - before) * mask).sum(-1, keepdim=True).exp()


def model_forward(model, processed_inputs, is_reward_model=False, allow_flash_attn_args=True, use_cache=False):
    named = {"flash_attn_kwargs": processed_inputs.flash_attn_kwargs} if processed_inputs.flash_attn_kwargs else {}
    return model(
        input_ids=processed_inputs.input_ids,
        attention_mask=processed_inputs.attention_mask,
        position_ids=processed_inputs.position_ids,
        use_cache=use_cache,
        **named,
    )


def automodel():
    """Their module of forward passes: what it calls, it looks up in itself."""
    return sys.modules["nemo_rl.models.automodel.train"]


def forward_with_post_processing_fn(
    model,
    post_processing_fn,
    processed_mb,
    is_reward_model=False,
    allow_flash_attn_args=True,
    global_valid_seqs=None,
    global_valid_toks=None,
    sampling_params=None,
    sequence_dim=1,
):
    outputs = automodel().model_forward(
        model,
        processed_mb.processed_inputs,
        is_reward_model=is_reward_model,
        allow_flash_attn_args=allow_flash_attn_args,
        use_cache=False,
    )
    result, metrics = post_processing_fn(
        logits=outputs.logits,
        data_dict=processed_mb.data_dict,
        processed_inputs=processed_mb.processed_inputs,
        global_valid_seqs=global_valid_seqs,
        global_valid_toks=global_valid_toks,
        sequence_dim=sequence_dim,
    )
    return result, metrics, processed_mb


def automodel_forward_backward(model, data_iterator, post_processing_fn, forward_only=False):
    results = []
    for processed_mb in data_iterator:
        result, metrics, _ = automodel().forward_with_post_processing_fn(
            model=model,
            post_processing_fn=post_processing_fn,
            processed_mb=processed_mb,
            is_reward_model=False,
            allow_flash_attn_args=True,
            global_valid_seqs=torch.tensor(4),
            global_valid_toks=torch.tensor(100),
            sampling_params=None,
            sequence_dim=1,
        )
        if not forward_only:
            result.backward()
        results.append((result.item(), metrics))
    return results


class DTensorPolicyWorkerV2Impl:
    """The flow of their worker: one optimizer step over a batch, two rows a micro-batch."""

    def __init__(self, config, weights_path=None, optimizer_path=None, init_optimizer=True, **kwargs):
        self.cfg, self.model, self.dp_size = config, build_model(), 1
        self.enable_seq_packing = config["sequence_packing"]["enabled"]

    def train(self, data, loss_fn, eval_mode=False, gbs=None, mbs=None, check_dim_skip_keys=None):
        assert (loss_fn.loss_type, loss_fn.input_type) == ("token_level", "logprob")
        parts = [data.slice(i, i + 2) for i in range(0, data.size, 2)]
        iterator = (
            ProcessedMicrobatch(p, process(p, self.enable_seq_packing), p.size, p["input_ids"].shape[1]) for p in parts
        )
        post_processor = LossPostProcessor(loss_fn, self.enable_seq_packing)
        return automodel_forward_backward(self.model, iterator, post_processor, forward_only=eval_mode)


def Policy(cluster, config, tokenizer, worker_extension_cls_fqn=None):  # noqa: N802
    return worker_extension_cls_fqn


def setup(master_config, tokenizer, dataset, val_dataset, processor=None, policy_factory=None):
    return (policy_factory or Policy)(cluster=None, config=master_config.policy, tokenizer=tokenizer)


@pytest.fixture
def nemo(monkeypatch):
    """The page's worker module, in a process group of one."""
    install(
        monkeypatch,
        {
            "ray": {"remote": lambda **options: lambda wrapped: wrapped},
            "nemo_rl.models.automodel.train": {
                "forward_with_post_processing_fn": forward_with_post_processing_fn,
                "model_forward": model_forward,
            },
            "nemo_rl.models.policy.utils": {"get_runtime_env_for_policy_worker": lambda policy_worker_name: {}},
            "nemo_rl.models.policy.workers.dtensor_policy_worker_v2": {
                "DTensorPolicyWorkerV2Impl": DTensorPolicyWorkerV2Impl
            },
            "nemo_rl.algorithms.grpo": {"Policy": Policy, "setup": setup},
            "nemo_rl.distributed.ray_actor_environment_registry": {"ACTOR_ENVIRONMENT_REGISTRY": {}},
            "nemo_rl.distributed.virtual_cluster": {"PY_EXECUTABLES": types.SimpleNamespace(AUTOMODEL="automodel")},
        },
    )
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    worker, _ = page_code("nemo_rl.md")
    yield run_page(monkeypatch, "rhythm_nemo", worker)
    dist.destroy_process_group()


def config(packed=False, gbs=4, **parallel):
    sizes = {"tensor_parallel_size": 1, "context_parallel_size": 1, **parallel}
    return {"dtensor_cfg": sizes, "sequence_packing": {"enabled": packed}, "train_global_batch_size": gbs}


def batch():
    """Four rows, padded on the right; an environment wrote some of the second response, the third is not trained."""
    prompts, responses = ragged([5, 3, 9, 4], [40, 44, 33, 21], len(WORDS))
    rows = [torch.cat(pair) for pair in zip(prompts, responses)]
    masks = [(torch.arange(len(row)) >= len(prompt)).long() for row, prompt in zip(rows, prompts)]
    masks[1][11:15] = masks[1][-6:] = 0
    tokens, token_mask = (pad_sequence(parts, batch_first=True) for parts in (rows, masks))
    return BatchedDataDict(
        input_ids=tokens,
        input_lengths=torch.tensor([len(row) for row in rows]),
        token_mask=token_mask,
        sample_mask=torch.tensor([1.0, 1.0, 0.0, 1.0]),
        advantages=torch.tensor([[1.0], [-0.5], [0.25], [2.0]]).expand(tokens.shape),
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mode", ["coupled", "global"])
def test_the_loss_gets_advantages_times_gamma_of_full_maps(nemo, packed, mode):
    nemo.SETTINGS = replace(nemo.SETTINGS, mode=mode)
    worker, data, loss_fn = nemo.RhythmPolicyWorker(config(packed)), batch(), ClippedPGLossFn()
    worker.train(data, loss_fn)
    live = torch.arange(data["input_ids"].shape[1]) < data["input_lengths"][:, None]
    mask = (data["token_mask"] * data["sample_mask"][:, None]).bool()
    gamma = gamma_from_maps(build_model(), data["input_ids"], live, mask, worker.credit.groups, nemo.SETTINGS)
    assert ((gamma > 1) & mask).sum() > 20
    for met, advantages, factor in zip(loss_fn.met, data["advantages"], gamma, strict=True):
        torch.testing.assert_close(met, (advantages * factor)[: len(met)])
    assert worker.seen
    groups = groups_from_maps(build_model(), data["input_ids"][:2], live[:2], mask[:2], nemo.SETTINGS)
    assert (list(worker.credit.groups.local), list(worker.credit.groups.global_)) == groups
    assert torch.equal(data["advantages"], batch()["advantages"])  # the batch of the trainer is left as it was


@pytest.mark.parametrize("packed", [False, True])
def test_gamma_of_one_leaves_every_bit(nemo, packed):
    nemo.SETTINGS = replace(nemo.SETTINGS, gamma_amp=1.0)
    mine, theirs = nemo.RhythmPolicyWorker(config(packed)), DTensorPolicyWorkerV2Impl(config(packed))
    assert mine.train(batch(), ClippedPGLossFn()) == theirs.train(batch(), ClippedPGLossFn())
    for ours, other in zip(mine.model.parameters(), theirs.model.parameters()):
        assert torch.equal(ours.grad, other.grad)


def test_evaluation_and_what_comes_after_a_step_are_theirs(nemo):
    worker, loss_fn = nemo.RhythmPolicyWorker(config()), ClippedPGLossFn()
    worker.train(batch(), loss_fn, eval_mode=True)
    assert torch.equal(torch.stack(loss_fn.met), batch()["advantages"])
    worker.train(batch(), loss_fn)
    assert automodel().model_forward is model_forward
    assert automodel().forward_with_post_processing_fn is forward_with_post_processing_fn


def test_what_it_cannot_honour_is_refused_by_name(nemo):
    with pytest.raises(ValueError, match=r"policy.dtensor_cfg.context_parallel_size must be 1, got 2"):
        nemo.RhythmPolicyWorker(config(context_parallel_size=2))
    with pytest.raises(ValueError, match=r"policy.train_global_batch_size must be the 4 responses of a step, got 2"):
        nemo.RhythmPolicyWorker(config(gbs=2)).train(batch(), ClippedPGLossFn())
    with pytest.raises(RuntimeError, match="does not see which tokens credit chose"):
        nemo.RhythmPolicyWorker(config()).train(batch(), SequenceRatioLossFn())
    nemo.SETTINGS = replace(nemo.SETTINGS, mode="random")
    with pytest.raises(ValueError, match="SETTINGS must be of mode local, global or coupled, got 'random'"):
        nemo.RhythmPolicyWorker(config())


def test_a_step_that_has_moved_stops_the_first_step(nemo, monkeypatch):
    worker = nemo.RhythmPolicyWorker(config())
    elsewhere = types.SimpleNamespace(forward_with_post_processing_fn=forward_with_post_processing_fn)
    elsewhere.model_forward = model_forward
    with monkeypatch.context() as moved:
        moved.setitem(globals(), "automodel", lambda: elsewhere)
        with pytest.raises(RuntimeError, match="no training forward was measured"):
            worker.train(batch(), ClippedPGLossFn())
    monkeypatch.delattr(automodel(), "model_forward")
    with pytest.raises(AttributeError, match="model_forward"):
        worker.train(batch(), ClippedPGLossFn())


def started(monkeypatch, policy_factory=None, **dtensor):
    """What the page's start makes of the policy, by the name of its worker."""
    ran = []
    monkeypatch.setattr("runpy.run_path", lambda path, run_name: ran.append((path, run_name)))
    run_page(monkeypatch, "start_rhythm", page_code("nemo_rl.md")[1])
    assert ran == [("examples/run_grpo.py", "__main__")]
    grpo = sys.modules["nemo_rl.algorithms.grpo"]
    policy = {"dtensor_cfg": {"enabled": True, "_v2": True, **dtensor}}
    return grpo.setup(types.SimpleNamespace(policy=policy), None, None, None, policy_factory=policy_factory)


def test_the_start_gives_the_policy_our_worker_and_the_log_says_so(nemo, monkeypatch, capsys, caplog):
    made = started(monkeypatch)
    registry = sys.modules["nemo_rl.distributed.ray_actor_environment_registry"].ACTOR_ENVIRONMENT_REGISTRY
    assert registry == {made: "automodel"}
    module, _, name = made.rpartition(".")
    getattr(sys.modules[module], name)(config())
    assert "rhythm credit is on in NeMo-RL's DTensor worker" in capsys.readouterr().err + caplog.text


@pytest.mark.usefixtures("nemo")
def test_the_start_refuses_other_workers_by_name(monkeypatch):
    for dtensor in ({"enabled": False}, {"_v2": False}):
        with monkeypatch.context() as one, pytest.raises(ValueError, match=r"policy.dtensor_cfg.enabled and ._v2 must"):
            started(one, **dtensor)
    with pytest.raises(ValueError, match=r"data_plane.enabled must be false"):
        started(monkeypatch, policy_factory=lambda **named: None)
