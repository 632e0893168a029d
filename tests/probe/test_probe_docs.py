"""docs/probe.md, typed by a user: its blocks run in order, with tiny models in the place of the hub's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from rhythm_kernels import RhythmProbe
from rhythm_kernels.integrations.transformers import NAME
from rhythm_kernels.probe import lse
from rhythm_kernels.probe.layer_call import STREAMED
from rhythm_kernels.probe.readers import READERS, LseFrom, reader_of

from . import probe_models as models

DOCS = Path(__file__).parents[2] / "docs" / "probe.md"
TEXT = DOCS.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


class Tokenizer:
    """What the first block asks of a tokenizer: left-padded ids."""

    @classmethod
    def from_pretrained(cls, name, padding_side):
        assert padding_side == "left"
        return cls()

    def __call__(self, texts, return_tensors, padding):
        mask = torch.ones(len(texts), 9, dtype=torch.long)
        mask[0, :3] = 0
        return {"input_ids": models.tokens(len(texts), 9), "attention_mask": mask}


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "mistral"])
def test_blocks(family, monkeypatch, tmp_path):
    class Model:
        @classmethod
        def from_pretrained(cls, name, attn_implementation="sdpa"):
            return models.tiny_model(family, attn_implementation)

    monkeypatch.chdir(tmp_path)
    padded, packed, loop, rhythm = BLOCKS
    hub = "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    assert hub in padded
    padded = padded.replace(hub, "")
    names: dict = {"AutoModelForCausalLM": Model, "AutoTokenizer": Tokenizer}
    exec(padded, names)
    assert names["probe"].waad.shape == names["probe"].fai.shape == (2, 9)
    assert not names["probe"].waad[0, :3].any()
    exec(packed, names)
    assert names["probe"].waad.shape == (1, 17)
    assert not names["probe"].waad[0, [0, 5, 14]].any()  # the first token of a sequence sees itself alone
    losses = []
    names["batches"] = [
        {"input_ids": models.tokens(2, length, seed=length), "response_mask": torch.ones(2, length).bool()}
        for length in (9, 12, 20)
    ]
    names["my_loss"] = lambda output, waad, fai: (losses.append(waad.shape), output.logits.float().mean())[1]
    groups = names["probe"].groups
    exec(loop.replace("100 == 99", "2 == 1"), names)
    assert losses == [(2, 9), (2, 12), (2, 20)]
    assert names["probe"].groups is not groups
    exec(rhythm, names)
    with torch.no_grad(), RhythmProbe(names["model"], groups) as probe:
        names["model"](models.tokens(2, 15))
    assert set(probe.lse_source.values()) == {"rhythm attention"}


def table_of_implementations():
    """The cells of each entry, below the header."""
    rows = re.search(r"^\| implementation \|.*\n\| ---.*\n((?:\|.*\n)+)", TEXT, re.MULTILINE)[1].splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_table_of_implementations_is_the_codes():
    expected = [
        (
            reader.name,
            reader.lse.value,
            "their lengths" if reader.takes_lengths else "its mask",
            "its argument" if reader.takes_window else "its mask",
            ", ".join(sorted(reader.drops)) or "nothing",
        )
        for reader in READERS
    ]
    found = [
        (re.match(r"`([^`]+)`", name)[1], source, packing, window, dropped)
        for name, source, _, packing, window, dropped in table_of_implementations()
    ]
    assert found == expected


def test_the_table_names_every_source_that_the_probe_reports():
    named = {source for row in table_of_implementations() for source in re.findall(r"`([^`]+)`", row[2])}
    assert named == {*lse._ATEN_SOURCES.values(), *lse._FLASH_SOURCES.values(), STREAMED}


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("flash_attention_2", "flash_attention_2"),
        ("flash_attention_3", "*flash*"),
        ("kernels-community/vllm-flash-attn3", "*flash*"),
        ("sdpa", "sdpa"),
    ],
)
def test_the_first_entry_that_fits_a_name_is_its_reader(name, entry):
    assert reader_of(name).name == entry


def test_our_own_attention_has_an_entry():
    assert reader_of(NAME).lse is LseFrom.OURS
    for unknown in ("paged|sdpa", "mystery", "sdpa_2"):
        with pytest.raises(NotImplementedError, match=re.escape(repr(unknown))):
            reader_of(unknown)
