"""What we rest on in TRL, rule by rule: held by the TRL that is installed, and each seen to fail.

`every_trl.py` holds every release to the same rules (`make matrix`, row `trl-contract`).
"""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path

import pytest
import torch

from . import every_trl
from .smallest_trl import ALTERED, FORWARD, READ, TRAINER, UTILS
from .trl_contract import RULES, broken
from .trl_source import GENERATE, LOSS, PASS, PASSES, BrokenError, Release


def installed() -> Release:
    folder = Path(importlib.util.find_spec("trl").origin).parent / "trainer"
    return Release((folder / "grpo_trainer.py").read_text(), (folder / "utils.py").read_text())


def test_the_installed_trl_keeps_every_rule():
    assert broken(installed()) == []


def test_the_smallest_trl_keeps_every_rule():
    assert broken(Release(TRAINER, UTILS)) == []


@pytest.mark.parametrize(("rule", "before", "after", "said"), ALTERED)
def test_a_rule_that_is_broken_is_told(rule, before, after, said):
    assert before in TRAINER + UTILS
    (held,) = (one for one in RULES if one.__name__.startswith(rule))
    with pytest.raises(BrokenError, match=said):
        held(Release(TRAINER.replace(before, after), UTILS.replace(before, after)))


def test_every_rule_is_seen_to_fail():
    assert {one.__name__ for one in RULES} == {
        one.__name__ for one in RULES for rule, *_ in ALTERED if one.__name__.startswith(rule)
    }


def test_a_rule_says_what_holds_and_what_does_not():
    (said,) = broken(Release(TRAINER.replace("self._step += 1", "pass"), UTILS))
    assert said == (
        "A batch is generated every `steps_per_generation * num_iterations` steps and kept in `_buffered_inputs`. "
        "But training_step has no self._step += 1."
    )


def test_passes_are_those_of_the_adapter():
    from rhythm_kernels.integrations.trl import inputs as trl_inputs

    assert PASSES == trl_inputs.PASSES


def test_images_of_a_pass_that_hands_all_on(monkeypatch):
    """As in TRL 1.14.0 to 1.14.2, where another method names them: a pass of our own has them all the same."""
    from types import SimpleNamespace

    from rhythm_kernels.integrations.trl import inputs as trl_inputs

    class HandsOn:
        def _get_per_token_logps_and_entropies(self, model, *args, batch_size=None, **kwargs):
            return self._full_logits_logps(model, *args, batch_size=batch_size, **kwargs)

        def _full_logits_logps(self, model, input_ids, attention_mask, logits_to_keep, pixel_values=None, **_): ...

    monkeypatch.setattr(trl_inputs, "GRPOTrainer", HandsOn)
    output = {f"{part}_{kind}": torch.ones(2, 3) for part in ("prompt", "completion") for kind in ("ids", "mask")}
    output["pixel_values"], output["advantages"] = torch.ones(2, 3, 4, 4), torch.ones(2)
    trainer = SimpleNamespace(args=SimpleNamespace(per_device_train_batch_size=2), model=SimpleNamespace(training=True))
    arguments, named = trl_inputs.log_prob_arguments(trainer, output)
    assert [x if isinstance(x, int) else tuple(x.shape) for x in arguments] == [(2, 6), (2, 6), 3]
    assert set(named) == {"pixel_values", "batch_size"}


def test_fingerprints_tell_methods_apart():
    plain = Release(TRAINER, UTILS)
    told = Release(TRAINER.replace("Log-probs, and entropies.", "Other words."), UTILS)
    other = Release(TRAINER.replace("return logps, entropies", "return logps, -entropies"), UTILS)
    for name in (GENERATE, LOSS, PASS):
        assert plain.fingerprint(name) == told.fingerprint(name)
        assert (plain.fingerprint(name) == other.fingerprint(name)) == (name != PASS)
    hands_on = TRAINER + "\n    def _full_logits_logps(self):\n        return 1\n"
    assert Release(hands_on, UTILS).fingerprint(PASS) != Release(hands_on.replace("1\n", "2\n"), UTILS).fingerprint(
        PASS
    )


def test_releases_that_are_allowed(tmp_path):
    (tmp_path / "pyproject.toml").write_text('train = [\n    "trl>=1.0,!=1.15.0",\n    "transformers>=5.5",\n]\n')
    words = "trl (1.16.0)\nAvailable versions: 1.16.0, 1.15.0, 1.9.2, 1.10.0, 1.0.0, 0.29.1\n  INSTALLED: 1.0.0\n"
    found = every_trl.allowed(words, tmp_path / "pyproject.toml")
    assert found == ["1.0.0", "1.9.2", "1.10.0", "1.16.0"]
    assert "1.15.0" not in every_trl.allowed(words)
    with pytest.raises(SystemExit, match="no version of trl"):
        every_trl.allowed("ERROR: No matching distribution found")


def test_the_table_of_releases(tmp_path, capsys):
    """What changed against the release before, by a new fingerprint; a broken rule is told and makes it fail."""

    def wheel(version, trainer):
        path = tmp_path / f"trl-{version}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("trl/trainer/grpo_trainer.py", trainer)
            archive.writestr("trl/trainer/utils.py", UTILS)
        return version, path

    changed = TRAINER.replace("advantages * mask)", "mask * advantages)")
    wheels = [wheel("1.0.0", TRAINER), wheel("1.1.0", TRAINER), wheel("1.2.0", changed)]
    assert every_trl.report(wheels) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[1:4]] == ["1.0.0", "1.1.0", "1.2.0"]
    assert rows[2][1:4] == ["=", "=", "="]
    assert rows[3][1] == rows[3][3] == "=" and rows[3][2] == Release(changed, UTILS).fingerprint(LOSS)
    early = TRAINER.replace(FORWARD, READ + FORWARD)
    assert every_trl.report([*wheels, wheel("1.3.0", early)]) == 1
    assert "1.3.0: `_compute_loss` reads" in capsys.readouterr().out
