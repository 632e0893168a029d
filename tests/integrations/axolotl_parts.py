"""What a run of axolotl names in its YAML: a transform of rows, and trainers to compare with. Imports axolotl."""

from __future__ import annotations

from axolotl.core.trainers.grpo.trainer import AxolotlGRPOTrainer

from tests.integrations.test_trl import FedFromMaps


def questions(cfg, *_, **__):
    """Rows of a prompt alone, as axolotl's `type` of a dataset for GRPO names it."""

    def transform(example, tokenizer=None):
        return {"prompt": example["question"]}

    return transform, {"remove_columns": ["question"]}


class Fed(FedFromMaps, AxolotlGRPOTrainer):
    """axolotl's trainer, with gamma of full eager maps: the oracle."""
