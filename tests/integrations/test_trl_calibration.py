"""Calibration inside TRL's own log-prob pass: heads are grouped by what the training forward attends to.

The oracle replays what the loss gave the model on a copy in eager attention, and takes spans from its full maps.
"""

from __future__ import annotations

import copy
import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import ProcessorMixin
from trl import GRPOConfig, GRPOTrainer

from rhythm_kernels.integrations.trl import RhythmGRPOConfig, RhythmGRPOTrainer
from rhythm_kernels.integrations.trl.inputs import response_mask
from rhythm_kernels.probe.calibration import Calibration
from rhythm_kernels.probe.split_batch import BatchCalibration

from .toy import RHYTHM, WORDS, build_model, build_tokenizer, dataset, losses, options, reward, train, weights

LAYERS = [1, 2]  # `middle5` of four layers
# Where groups are made: before the training forward, and before TRL's pass for the old log-probs.
PATHS = {"training forward": {}, "old log-probs": {"num_iterations": 2}}
IMAGES = ("pixel_values", "image_grid_thw", "mm_token_type_ids")


class Watched(RhythmGRPOTrainer):
    """Keeps what the model was given by the loss, and R."""

    def _compute_loss(self, model, inputs):
        mask = response_mask(inputs)

        def keep(module, args, given):
            self.given.append((given, over_sequence(mask, given["input_ids"])))

        handle = self.model.model.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            return super()._compute_loss(model, inputs)
        finally:
            handle.remove()

    @property
    def given(self):
        return self.__dict__.setdefault("_given", [])


def over_sequence(mask, input_ids):
    """A response mask over prompt and completion."""
    return torch.nn.functional.pad(mask.bool(), (input_ids.shape[1] - mask.shape[1], 0))


def spans_from_maps(model, given):
    """Head -> span (eq. 7) over the responses of all forwards, from maps kept in full."""
    eager = copy.deepcopy(model).eval()
    eager.set_attn_implementation("eager")
    total = torch.zeros(len(LAYERS), 4, dtype=torch.float64)
    tokens = 0
    for inputs, mask in given:
        with torch.no_grad():
            maps = eager(**inputs, output_attentions=True).attentions
        place = torch.arange(mask.shape[1])
        distance = (place[:, None] - place).clamp(min=0).double()
        spans = torch.stack([(maps[layer].double() * distance).sum(-1) for layer in LAYERS], dim=1)
        inside = (mask.cumsum(1) > 0) & (mask.flip(1).cumsum(1).flip(1) > 0)  # from first to last token
        total += (spans * inside[:, None, None]).sum((0, 3))
        tokens += int(inside.sum())
    return {(LAYERS[i], head): float(total[i, head]) / tokens for i in range(len(LAYERS)) for head in range(4)}


def ranked(spans):
    order = sorted(spans, key=lambda head: (spans[head], head))
    return order[:2], order[-2:]


def found(groups):
    return groups.local, groups.global_


def recorded(groups):
    return [*groups.provenance["span"]["local"], *groups.provenance["span"]["global"]]


def expected(spans):
    local, global_ = ranked(spans)
    return [spans[head] for head in (*local, *global_)]


@pytest.mark.parametrize("path", PATHS)
def test_groups_are_those_of_the_training_forward(tmp_path, path):
    changed = {"learning_rate": 0.0, "max_steps": 1, **PATHS[path]}
    trainer = train(Watched, RhythmGRPOConfig, tmp_path, **changed, **RHYTHM)
    spans = spans_from_maps(trainer.model.model, trainer.given)
    assert found(trainer.rhythm_groups) == ranked(spans)
    assert recorded(trainer.rhythm_groups) == pytest.approx(expected(spans), abs=1e-4)


@pytest.mark.parametrize(
    "kind",
    ["qwen2_5_vl", pytest.param("qwen2_vl", marks=pytest.mark.long), pytest.param("qwen3_vl", marks=pytest.mark.long)],
)
@pytest.mark.parametrize("path", PATHS)
def test_groups_see_the_pictures(tmp_path, kind, path):
    """Vision-language models: image features in place, and the positions that images give (M-RoPE)."""
    if not hasattr(ProcessorMixin, "replace_image_token"):
        pytest.skip("a processor without torchvision needs a later transformers")
    from .toy_vision import PADS, build_processor, build_vision_model, pictures

    def answers(completions, **_):
        return reward([answer[0]["content"] for answer in completions])

    changed = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "learning_rate": 0.0, "max_steps": 1}
    processor = build_processor()
    pads = processor.tokenizer.convert_tokens_to_ids(PADS)  # of which a response with none of its pictures has none
    changed["generation_kwargs"] = {"suppress_tokens": pads}
    args = RhythmGRPOConfig(**options(tmp_path, **changed, **PATHS[path]), **RHYTHM)
    trainer = Watched(build_vision_model(kind), answers, args, pictures(), processing_class=processor)
    trainer.train()
    assert all(name in given for given, _ in trainer.given for name in IMAGES)
    spans = spans_from_maps(trainer.model.model, trainer.given)
    assert found(trainer.rhythm_groups) == ranked(spans)
    assert recorded(trainer.rhythm_groups) == pytest.approx(expected(spans), abs=1e-4)

    blind = [({name: x for name, x in given.items() if name not in IMAGES}, mask) for given, mask in trainer.given]
    without = spans_from_maps(trainer.model.model, blind)
    assert found(trainer.rhythm_groups) != ranked(without)
    assert max(abs(spans[head] - without[head]) for head in spans) > 0.1


def test_groups_are_of_the_precision_of_training(tmp_path):
    """TRL's passes run under autocast: so does calibration."""
    changed = {"learning_rate": 0.0, "max_steps": 1, "bf16": True}
    trainer = train(Watched, RhythmGRPOConfig, tmp_path, **changed, **RHYTHM)
    spans = []
    for autocast in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Calibration(trainer.model, LAYERS) as training:
            for given, mask in trainer.given:
                training.response_mask = mask
                trainer.model.model(**given)
        spans.append(recorded(training.groups()))
    assert recorded(trainer.rhythm_groups) == pytest.approx(spans[0], abs=1e-6)
    assert recorded(trainer.rhythm_groups) != pytest.approx(spans[1], abs=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_dropout_takes_no_random_numbers_from_training(tmp_path, path):
    """Calibration runs without dropout and leaves every module in its mode: gamma of 1 is TRL bit for bit."""

    def dropping():
        model = build_model()
        for layer in model.model.layers[::2]:
            layer.self_attn.attention_dropout = 0.2
        model.model.layers[1].eval()
        return model

    runs = []
    for kind, config, changed in (
        (GRPOTrainer, GRPOConfig, {}),
        (RhythmGRPOTrainer, RhythmGRPOConfig, {"rhythm_gamma_amp": 1.0, **RHYTHM}),
    ):
        runs.append(train(kind, config, tmp_path, model=dropping(), **changed, **PATHS[path]))
    assert runs[1].rhythm_groups is not None
    assert losses(runs[0]) == losses(runs[1])
    assert torch.equal(*map(weights, runs))


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_passes_go_in_chunks_of_trl(tmp_path, monkeypatch, path, tools):
    """Of the sixteen responses no forward sees more than four, and no logits are made but those of their answers."""
    sizes, logits = [], []
    original = GRPOTrainer._generate_and_score_completions

    def generate(self, inputs):
        output = original(self, inputs)
        if tools:  # a tool had the last word of some: the pass for the old log-probs is measured again
            output["tool_mask"] = output["completion_mask"].clone()
            output["tool_mask"][::3, 9:] = 0
        return output

    def count(module, args, given):
        if given.get("cache") is None and given.get("past_key_values") is None:
            sizes.append(given["input_ids"].shape[0])

    model = build_model()
    model.model.register_forward_pre_hook(count, with_kwargs=True)
    model.lm_head.register_forward_hook(lambda module, args, made: logits.append(made.numel() // len(WORDS)))
    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", generate)
    changed = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_completion_length": 30}
    args = RhythmGRPOConfig(**options(tmp_path, max_steps=1, **changed, **PATHS[path]), **RHYTHM)
    trainer = RhythmGRPOTrainer(model, reward, args, dataset(), processing_class=build_tokenizer())
    trainer.train()
    assert trainer.rhythm_groups is not None
    assert set(sizes) == {4}
    assert max(logits) <= 4 * 31


def test_a_pass_that_misses_rows_is_loud():
    model, mask = build_model().eval(), torch.ones(4, 9, dtype=torch.bool)
    ids = torch.randint(2, len(WORDS), (4, 9))
    with torch.no_grad(), BatchCalibration(model, "middle5", 0.3, mask) as calibration:
        model(ids[:3], use_cache=False)
    with pytest.raises(
        RuntimeError, match=r"response_mask must have as many batch rows .*, got shape \(4, 9\) for 3 batch rows"
    ):
        calibration.groups()


def sharded_1(model, mesh):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    policy = partial(transformer_auto_wrap_policy, transformer_layer_cls={type(model.model.layers[0])})
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"), device_mesh=mesh
    )


def sharded_2(model, mesh):
    """In the units that accelerate makes."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    rest = [model.model.norm, model.get_input_embeddings(), model.get_output_embeddings()]  # the last two are tied
    fully_shard(rest, mesh=mesh, reshard_after_forward=False)
    return fully_shard(model, mesh=mesh)


def written(rank):
    """What a generation engine of its own wrote for a rank; the ranks' responses differ in text and length."""
    generator = torch.Generator().manual_seed(rank)
    mask = (torch.arange(20) < torch.tensor([20, 13, 17, 8])[:, None] - 3 * rank).int()
    return {
        "prompt_ids": torch.randint(2, len(WORDS), (4, 10), generator=generator),
        "prompt_mask": torch.ones(4, 10, dtype=torch.int),
        "completion_ids": torch.randint(2, len(WORDS), (4, 20), generator=generator),
        "completion_mask": mask,
        "advantages": torch.tensor([1.0, -0.5, 0.3, -0.8]),
        "num_items_in_batch": mask.sum(),
    }


def tokens_of(batch):
    return tuple(torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))


def _sharded_rank(rank: int, folder: str, path: str) -> None:
    torch.set_num_threads(1)
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    os.environ.update({name: str(value) for name, value in here.items()}, ACCELERATE_USE_CPU="true")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    batch = written(rank)

    def generate(self, inputs):  # no forward of the model comes first
        output = dict(batch)
        if path == "old log-probs":
            tokens, live = tokens_of(output)
            with torch.no_grad():
                logps = self._get_per_token_logps_and_entropies(self.model, tokens, live, 20, batch_size=2)[0]
            output["old_per_token_logps"] = logps
        return output

    GRPOTrainer._generate_and_score_completions = generate
    parts = []
    for part in map(written, range(2)):
        tokens, live = tokens_of(part)
        given = {"input_ids": tokens, "attention_mask": live, "use_cache": False}
        parts.append((given, over_sequence(part["completion_mask"], tokens)))
    spans, of_the_first = (spans_from_maps(build_model().model, some) for some in (parts, parts[:1]))
    for shard in (sharded_1, sharded_2):
        changed = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **PATHS[path]}
        args = RhythmGRPOConfig(**options(folder, **changed), **RHYTHM)
        trainer = RhythmGRPOTrainer(build_model(), reward, args, dataset(), processing_class=build_tokenizer())
        assert trainer.accelerator.num_processes == 2
        trainer.model = trainer.model_wrapped = shard(trainer.model, mesh)
        trainer.current_gradient_accumulation_steps = 2

        mask = batch["completion_mask"]
        batch["completion_mask"] = torch.zeros_like(mask)  # nobody has a response token: all wait for the next batch
        trainer._generate_and_score_completions(None)
        assert trainer.rhythm_groups is None
        if rank == 0:  # one has none: the groups are those of the others' part
            batch["completion_mask"] = mask
        trainer._generate_and_score_completions(None)
        assert recorded(trainer.rhythm_groups) == pytest.approx(expected(of_the_first), abs=1e-4)
        assert trainer.rhythm_groups.provenance["calibration"]["sequences"] == 8
        batch["completion_mask"] = mask
        trainer.rhythm._groups = None

        inputs = trainer._generate_and_score_completions(None)
        assert found(trainer.rhythm_groups) == ranked(spans)
        assert recorded(trainer.rhythm_groups) == pytest.approx(expected(spans), abs=1e-4)
        assert recorded(trainer.rhythm_groups) != pytest.approx(expected(of_the_first), abs=1e-4)
        trainer._compute_loss(trainer.model, inputs).backward()
        assert (inputs["rhythm_gamma"] > 1).any()
    dist.destroy_process_group()


@pytest.mark.parametrize("path", PATHS)
def test_sharded_models_calibrate_first(tmp_path, path):
    """FSDP 1 and 2 over two processes: the very first forward is a calibration, as where vLLM generates."""
    mp.spawn(_sharded_rank, (str(tmp_path), path), nprocs=2)
