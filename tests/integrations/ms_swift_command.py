"""`swift rlhf` as a user starts it, in processes of its own, with the plug-in: for the row `ms-swift` of the matrix."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from swift.utils import import_external_file

from rhythm_kernels import HeadGroups
from rhythm_kernels.integrations import ms_swift

from .ms_swift_maps import cases_of, gamma_of, groups_of
from .ms_swift_toy import CREDIT, command_line, write_toy
from .toy import build_model, eager_copy

ROOT = Path(__file__).parents[2]
DUMPING = """
import torch
from swift.trainers import TrainerFactory
from rhythm_kernels.integrations.ms_swift import RhythmGRPOTrainer
from tests.integrations.ms_swift_maps import sequences

class Dumping(RhythmGRPOTrainer):
    def _postprocess_batch(self, samples, batch_encoded_inputs):
        super()._postprocess_batch(samples, batch_encoded_inputs)
        if self.state.global_step == 0:
            first = batch_encoded_inputs[0]
            path = f"{self.args.output_dir}/process{self.accelerator.process_index}.pt"
            torch.save((sequences(first, False), first["grpo_batch"].rhythm_gamma), path)

TrainerFactory.TRAINER_MAPPING["grpo"] = f"{__name__}.Dumping"
"""


def _swift(toy, out, processes=1, plugins=("rhythm.py",), **changed):
    """`swift rlhf` in processes of its own, as a user starts it."""
    words = command_line(toy, out, external_plugins=[toy / name for name in ("reward.py", *plugins)], **changed)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RHYTHM_CREDIT": CREDIT}
    if processes > 1:
        environment["NPROC_PER_NODE"] = str(processes)
    program = os.path.join(os.path.dirname(sys.executable), "swift")
    return subprocess.run([program, "rlhf", *words], env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.mark.parametrize("processes", [1, 2])
def test_the_command_line(toy, tmp_path, processes):
    (toy / "dumping.py").write_text(DUMPING)
    options = {"per_device_train_batch_size": 8 // processes, "save_strategy": "steps", "save_steps": 2}
    plugins = ["rhythm.py"] if processes == 1 else ["rhythm.py", "dumping.py"]
    done = _swift(toy, tmp_path, processes, plugins, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("rhythm credit is on in RhythmGRPOTrainer (ms-swift 4.6.0): mode=coupled") == 1
    rows = [json.loads(line) for line in (tmp_path / "logging.jsonl").read_text().splitlines()]
    means = [row["rhythm/gamma_mean"] for row in rows if "rhythm/gamma_mean" in row]
    assert len(means) == 2
    assert all(1.1 < mean < 1.5 for mean in means)
    groups = HeadGroups.load(tmp_path / "checkpoint-2" / "rhythm_groups.json")
    if processes == 1:
        return
    parts = [torch.load(tmp_path / f"process{i}.pt", weights_only=False) for i in range(processes)]
    decoder = eager_copy(build_model())
    cases = [cases_of(decoder, alone) for alone, _ in parts]
    assert groups == groups_of([case for part in cases for case in part])  # of both processes' responses together
    summed = tokens = 0
    for part, (alone, gamma) in zip(cases, parts):
        torch.testing.assert_close(gamma, gamma_of(part, alone, groups, gamma.shape[1]), rtol=0, atol=1e-6)
        for row, (_, mask, inside) in zip(gamma, alone):
            chosen = mask[len(mask) - (inside.stop - inside.start) :]
            summed, tokens = summed + row[inside][chosen].sum().item(), tokens + int(chosen.sum())
    assert means[0] == pytest.approx(summed / tokens, abs=1e-5)  # the log is of both as well


def test_other_trainers_are_refused(toy, tmp_path):
    done = _swift(toy, tmp_path, rlhf_type="gkd")
    assert done.returncode != 0
    assert "rlhf_type must be 'grpo' for rhythm credit, got 'gkd'" in done.stderr


def test_a_trainer_registered_after_ours_is_refused(toy, tmp_path):
    (toy / "other.py").write_text(DUMPING.replace("(RhythmGRPOTrainer)", "(RhythmGRPOTrainer.__base__)"))
    done = _swift(toy, tmp_path, plugins=["rhythm.py", "other.py"])
    assert done.returncode != 0
    assert "external_plugins must register no GRPO trainer beside rhythm credit's, got Dumping" in done.stderr


def test_the_module_is_no_plugin_itself(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ImportError, match=r"^external_plugins must name a file of yours"):
        import_external_file(ms_swift.__file__)
