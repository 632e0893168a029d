"""Several processes: what the main one finds is known to all, they wait for it patiently, and they end together."""

from __future__ import annotations

import json
import os
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, set_hf_deepspeed_config

from training import processes, train
from training.recipe import RecipeError
from training.sharding import check_sharding, dividing, is_divided, whole_models


def found_by(rank, ask):
    """What a call says, as text that JSON can hold."""
    try:
        return ask()
    except (Exception, SystemExit) as error:
        return [type(error).__name__, str(error)]


def slow():
    time.sleep(4)
    return {"step": 3}


def refuse():
    raise RecipeError("output.path must be another folder")


def _rank(rank: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=2)
    )
    said = {"count": processes.count(), "main": processes.is_main()}
    said["slow"] = found_by(rank, lambda: processes.from_main(slow))  # twice as long as the timeout of the others
    said["refused"] = found_by(rank, lambda: processes.from_main(refuse))
    said["none"] = found_by(rank, lambda: processes.from_main(lambda: None))
    if rank == 0:
        time.sleep(4)
    said["waited"] = found_by(rank, processes.wait_for_all)
    if rank == 1:
        Path(folder, "1.json").write_text(json.dumps(said))
        os._exit(0)  # as where a process is killed
    said["alone"] = found_by(rank, processes.wait_for_all)
    Path(folder, "0.json").write_text(json.dumps(said))
    os._exit(0)


@pytest.mark.long
def test_two_processes_wait_and_end_together(tmp_path):
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    main, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert (main["count"], main["main"], other["main"]) == (2, True, False)
    assert main["slow"] == other["slow"] == {"step": 3}
    assert main["refused"] == ["RecipeError", "output.path must be another folder"]
    assert other["refused"] == ["Ended", "2"]  # without a word: an exit status
    assert main["none"] is other["none"] is None
    assert main["waited"] is other["waited"] is None
    assert main["alone"] == ["ConnectionError", "another process of the run has ended"]


def test_one_process_asks_nobody(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")  # of some other program: no launcher gave this process a number
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert processes.count() == 1 and processes.is_main()
    assert processes.from_main(lambda: 7) == 7
    processes.wait_for_all()
    with pytest.raises(RuntimeError, match="gloo"), processes.together():
        raise RuntimeError("gloo is not there")


@pytest.fixture
def other(monkeypatch):
    """The second of two processes."""
    for name, value in {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


def test_what_no_other_process_says_is_said(other, monkeypatch):
    """NCCL fails for reasons of its own, too."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(processes, "_last_word", lambda: "")
    with pytest.raises(ConnectionError, match="do not reach each other: NCCL error: Duplicate"), processes.together():
        raise RuntimeError("NCCL error: Duplicate GPU")


def test_other_settings_or_questions_than_the_main_process(monkeypatch):
    main = {"recipe": {"grpo": {"seed": 0}}, "train": "a"}
    monkeypatch.setattr(train, "from_main", lambda _: main)
    train.check_same(main)
    for mine, said in (
        ({"recipe": {"grpo": {"seed": 1}}, "train": "a"}, "recipe.grpo.seed was 0, is 1"),
        (main | {"train": "b"}, "train was a, is b"),
    ):
        with pytest.raises(RecipeError, match=f"the questions of the main one: {said}"):
            train.check_same(mine)


def test_zero3_divides_a_model_only_in_its_training():
    """DeepSpeed is no package of the tests: a configuration that says it is ZeRO-3's is enough for transformers."""
    divides = type("Configuration", (), {"is_zero3": lambda self: True})()
    config = SimpleNamespace(deepspeed_plugin=SimpleNamespace(dschf=divides))
    set_hf_deepspeed_config(divides)
    seen = []
    with whole_models(config):
        seen.append(is_deepspeed_zero3_enabled())
        with dividing(config):
            seen.append(is_deepspeed_zero3_enabled())
        seen.append(is_deepspeed_zero3_enabled())
    assert [*seen, is_deepspeed_zero3_enabled()] == [False, True, False, True]
    del divides, config  # transformers knows it by a weak reference
    assert not is_deepspeed_zero3_enabled()


@pytest.mark.parametrize(
    ("enabled", "version", "one_loads", "message"),
    [
        (False, 2, False, "distributed_type must not be FSDP without a GPU for each process"),
        (True, 1, False, "fsdp_version must be 2, got 1: see training/launch/fsdp2.yaml"),
        (True, 2, True, "fsdp_cpu_ram_efficient_loading must be false, got true"),
        (True, 2, False, None),
    ],
)
def test_which_launches_of_fsdp_are_refused(monkeypatch, enabled, version, one_loads, message):
    plugin = SimpleNamespace(fsdp_version=version, cpu_ram_efficient_loading=one_loads)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    trainer = SimpleNamespace(is_fsdp_enabled=enabled, accelerator=accelerator)
    check_sharding(trainer)  # nobody asked for FSDP
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match=message) if message else nullcontext():
        check_sharding(trainer)


def test_zero3_has_no_checkpoint_of_a_reference_model():
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3))
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(state=state), args=SimpleNamespace(sync_ref_model=True), is_fsdp_enabled=False
    )
    with pytest.raises(RecipeError, match=r"grpo.sync_ref_model must be false with ZeRO-3"):
        check_sharding(trainer)


@pytest.mark.parametrize(("stage", "fsdp", "divided"), [(2, False, False), (3, False, True), (None, True, True)])
def test_which_engines_divide(stage, fsdp, divided):
    state = SimpleNamespace(deepspeed_plugin=stage and SimpleNamespace(zero_stage=stage))
    assert is_divided(SimpleNamespace(is_fsdp_enabled=fsdp, accelerator=SimpleNamespace(state=state))) == divided
