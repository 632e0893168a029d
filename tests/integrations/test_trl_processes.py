"""Two processes learn what one does: DDP and FSDP2 over gloo, LoRA, recomputed activations, buffered batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .same_rows import carry_out

ROOT = Path(__file__).parents[2]
CASES = {
    "coupled": {"per_device_train_batch_size": 16},
    "uniform": {"per_device_train_batch_size": 16, "rhythm_mode": "uniform"},
    "buffered": {  # old log-probs are computed, and a batch is learnt from twice, in two parts each
        "per_device_train_batch_size": 8,
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
        "max_steps": 4,
        "gradient_checkpointing": True,
    },
    "groups divided": {  # the responses to one prompt are not all of one process
        "per_device_train_batch_size": 4,
        "num_generations": 8,
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 2,
    },
    "lora": {"lora": True, "per_device_train_batch_size": 16, "gradient_checkpointing": True},
}
# How a model is wrapped: the types of its wrapper, with and without an adapter, and of its parameters.
WRAPPED = {
    "ddp": ({}, {"DistributedDataParallel"}, "Parameter"),
    "fsdp2": (
        {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_RESHARD_AFTER_FORWARD": "true",
        },
        {"FSDPQwen3ForCausalLM", "FSDPPeftModel"},
        "DTensor",
    ),
}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process learns."""
    folder, threads = tmp_path_factory.mktemp("one"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, case in CASES.items():
            carry_out(folder, {"name": name, **case})
    finally:
        torch.set_num_threads(threads)
    return folder


def read(folder, name, rank):
    return json.loads((folder / f"{name}-{rank}.json").read_text())


@pytest.mark.long
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_two_processes_are_one(one, tmp_path, wrapped):
    environment, wrappers, kind = WRAPPED[wrapped]
    cases = json.dumps([{"name": name, **case} for name, case in CASES.items()])
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", "training/launch/cpu.yaml"),
            *("tests/integrations/same_rows.py", str(tmp_path), cases),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in CASES:
        alone, parts = read(one, name, 0), [read(tmp_path, name, rank) for rank in range(2)]
        assert {part["wrapper"] for part in parts} <= wrappers and parts[0]["kinds"] == [kind]
        assert sorted(parts[0]["rows"] + parts[1]["rows"]) == alone["rows"]  # gamma of every token, bit for bit
        assert all(part["groups"] == alone["groups"] for part in parts)
        assert parts[0]["weights"] == parts[1]["weights"]
        assert parts[0]["losses"] == pytest.approx(alone["losses"], abs=1e-5)
        if CASES[name].get("steps_per_generation", 1) == 1:  # otherwise a mean over parts that were shuffled otherwise
            assert parts[0]["gamma"] == pytest.approx(alone["gamma"], abs=1e-6)
        torch.testing.assert_close(*(torch.tensor(x["weights"]) for x in (parts[0], alone)), rtol=0, atol=1e-3)
        assert len({gamma for _, _, row in alone["rows"] for gamma in row}) >= (1 if name == "uniform" else 2)
        assert len(alone["losses"]) == CASES[name].get("max_steps", 3) and any(alone["losses"])
