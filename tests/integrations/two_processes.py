"""Run by `test_two_processes_agree` in each of two processes: train, then write what must be the same in both."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from rhythm_kernels.integrations.trl import RhythmGRPOConfig, RhythmGRPOTrainer
from tests.integrations.toy import RHYTHM, train, weights

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    changed = {"per_device_train_batch_size": 8, "num_iterations": int(sys.argv[2])}
    trainer = train(RhythmGRPOTrainer, RhythmGRPOConfig, folder, **changed, **RHYTHM)
    assert trainer.accelerator.num_processes == 2
    assert trainer.rhythm_groups is not None
    found = {
        "local": trainer.rhythm_groups.local,
        "global": trainer.rhythm_groups.global_,
        "weights": weights(trainer).tolist(),
        "gamma": [e["rhythm/gamma_mean"] for e in trainer.state.log_history if "rhythm/gamma_mean" in e],
    }
    (folder / f"rank{trainer.accelerator.process_index}.json").write_text(json.dumps(found))
