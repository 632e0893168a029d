"""`accelerate launch -m training train` on two processes over gloo: one folder, one line, the same run when resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from training.__main__ import main
from training.folder import remove
from training.recipe import ROOT

from .runs import TINY

DDP: dict[str, str] = {}
FSDP2 = {  # what training/launch/fsdp2.yaml makes of itself
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
SMALL = [
    *("task.numbers=[3]", "task.train_size=64", "eval.size=8", "grpo.per_device_train_batch_size=4"),
    *("grpo.num_generations=4", "grpo.max_completion_length=16", "grpo.max_steps=3", "grpo.steps_per_generation=2"),
    *("output.checkpoint_steps=1", "output.checkpoints_kept=null"),
]


def launch(environment, *words, module="tests.training.launched"):
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", "training/launch/cpu.yaml"),
            *("-m", module, *words),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def carried_out(environment, *words, **more):
    """Standard output and error of a launch that ends well."""
    process = launch(environment, *words, **more)
    out, error = process.communicate(timeout=400)
    assert process.returncode == 0, error[-3000:]
    return out, error


def lines_of(run):
    """What a run's metrics say, without times."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith("seconds")} for line in found]


def weights_of(run):
    return load_file(run / "model" / "model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts, by DDP, and what it prints."""
    run = tmp_path_factory.mktemp("launched") / "run"
    return run, *carried_out(DDP, "train", TINY, *SMALL, f"output.path={run}", module="training")


@pytest.mark.long
def test_two_processes_leave_one_run(whole, tmp_path):
    run, out, _ = whole
    assert "3 steps of 8 responses over 2 processes" in out
    assert out.count("Held-out accuracy") == 1
    assert [line["step"] for line in lines_of(run)] == [1, 2, 3]
    result = json.loads((run / "result.json").read_text())
    assert (result["steps"], result["processes"]) == (3, 2) and result["before"]["sampled"]["instances"] == 8
    assert {"config.yaml", "before.json", "report.html", "groups.json", "model", "checkpoints"} <= {
        path.name for path in run.iterdir()
    }
    assert main(["evaluate", str(run), "eval.size=8", "--output", str(tmp_path)]) == 0
    again = json.loads((tmp_path / "evaluation.json").read_text())
    assert again["sampled"]["right"] == result["after"]["sampled"]["right"]
    first = load_file(ROOT / "training" / "checkpoints" / "countdown_tiny" / "model.safetensors")
    assert not equal(first, weights_of(run))


@pytest.mark.long
@pytest.mark.parametrize("lora", [False, True])
def test_sharded_models(whole, tmp_path, lora):
    """FSDP2 trains as DDP does, responses included. Of LoRA, the adapter's merged weights are saved."""
    run = tmp_path / "run"
    words = ["model.lora={r: 4}", "grpo.learning_rate=0.01"] if lora else []
    out, _ = carried_out(FSDP2, "train", TINY, *SMALL, *words, f"output.path={run}")
    first = load_file(ROOT / "training" / "checkpoints" / "countdown_tiny" / "model.safetensors")
    if lora:
        assert "LoRA of rank 4 included" in out
        changed = {name for name, weight in weights_of(run).items() if not torch.equal(weight, first[name])}
        assert weights_of(run).keys() == first.keys()
        assert changed and all("_proj" in name for name in changed)
    else:
        assert lines_of(run) == lines_of(whole[0])
        assert equal(weights_of(run), weights_of(whole[0]))
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    result = json.loads((run / "result.json").read_text())
    assert main(["evaluate", str(run), "eval.size=8", "--output", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "evaluation.json").read_text())
    assert again["greedy"]["right"] == result["after"]["greedy"]["right"]


@pytest.mark.long
@pytest.mark.parametrize("environment", [DDP, FSDP2], ids=["ddp", "fsdp2"])
def test_killed_and_resumed(whole, tmp_path, environment):
    """Within a batch that each process has buffered, too: the losses and weights are those of the whole run."""
    run = tmp_path / "run"
    words = ["train", TINY, *SMALL, f"output.path={run}"]
    process = launch(environment, *words)
    until = time.monotonic() + 300
    while not (run / "checkpoints" / "checkpoint-1").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    started = psutil.Process(process.pid).children(recursive=True)
    for one in started:
        one.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0 and not (run / "result.json").exists()
    carried_out(environment, *words)
    assert json.loads((run / "result.json").read_text())["resumed"]
    assert lines_of(run) == lines_of(whole[0])
    assert equal(weights_of(run), weights_of(whole[0]))


@pytest.mark.long
def test_a_divided_reference_model_goes_on(tmp_path):
    """Each process has its part of it in a checkpoint."""
    run, other = tmp_path / "run", tmp_path / "other"
    words = [*SMALL, "grpo.beta=0.5", "grpo.sync_ref_model=true", "grpo.ref_model_sync_steps=1"]
    carried_out(FSDP2, "train", TINY, *words, f"output.path={run}")
    shutil.copytree(run, other)
    for name in ("result.json", "model", "checkpoints/checkpoint-2", "checkpoints/checkpoint-3"):
        remove(other / name)
    carried_out(FSDP2, "train", TINY, *words, f"output.path={other}")
    assert json.loads((other / "result.json").read_text())["resumed"] == [1]
    assert lines_of(other) == lines_of(run) and equal(weights_of(other), weights_of(run))


def said_by(error):
    """The lines of the program among those of the launcher; a progress bar may stand before one."""
    return [line[line.index("error: ") :] for line in error.splitlines() if "error: " in line]


@pytest.mark.long
def test_one_line_for_all(whole, tmp_path):
    """The main process says what is wrong for all, or what it alone finds; and that FSDP needs GPUs."""
    run = tmp_path / "run"
    for environment, words, message in (
        (DDP, ["grpo.max_steps=0"], "grpo.max_steps must be at least 1, got 0"),
        (DDP, [f"output.path={whole[0]}"], f"{whole[0]} holds a finished run"),
        (FSDP2, [], "distributed_type must not be FSDP without a GPU for each process"),
    ):
        process = launch(environment, "train", TINY, *SMALL, f"output.path={run}", *words, module="training")
        out, error = process.communicate(timeout=300)
        assert process.returncode != 0 and not out
        (line,) = said_by(error)
        assert message in line
        assert not run.exists()


@pytest.mark.long
def test_one_line_of_the_process_that_fails(tmp_path):
    """The main one says what the other said, and what is kept."""
    task = "task.name=tests.training.launched:Unlucky"
    process = launch(DDP, "train", TINY, *SMALL, task, f"output.path={tmp_path / 'run'}", module="training")
    _, error = process.communicate(timeout=300)
    assert process.returncode != 0
    (line,) = said_by(error)
    assert line.startswith("error: process 1: tests.training.launched:Unlucky: rewards[") and "LookupError" in line
    assert "it goes on with: python -m training train --resume" in line
    assert (tmp_path / "run" / "before.json").exists() and not (tmp_path / "run" / "result.json").exists()
