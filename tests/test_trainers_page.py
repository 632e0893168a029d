"""docs/trainers.md: its snippets run, its settings parse, its links lead somewhere, its versions are those that run."""

from __future__ import annotations

import ast
import logging
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import rhythm_kernels as rk
from rhythm_kernels.integrations.environment import VARIABLE, settings_from_environment

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "trainers.md"
TEXT = PAGE.read_text(encoding="utf-8")
MATRIX = (ROOT / "tests" / "matrix.sh").read_text(encoding="utf-8")
ROWS = [line.strip("| \n").split(" | ") for line in TEXT.splitlines() if line.startswith("| [")]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [PAGE, *sorted((ROOT / "docs" / "trainers").glob("*.md"))], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_every_page_is_in_the_table():
    linked = {re.search(r"\(([^)]+)\)", row[0])[1] for row in ROWS}
    assert {f"trainers/{page.name}" for page in (ROOT / "docs" / "trainers").glob("*.md")} <= linked
    assert all(len(row) in (4, 5) for row in ROWS)  # the last cell may be empty


def pins(package: str) -> list[str]:
    """The versions of a package that the rows of the matrix install."""
    return re.findall(rf"(?<![\w-]){package}==([\w.]+)", MATRIX)


def page_package(page: str) -> str:
    """The version or the commit whose names are looked for; a tag in a comment stands for its commit."""
    source = (ROOT / "tests" / "integrations" / "pages" / f"test_{page}.py").read_text(encoding="utf-8")
    version, tag = re.search(r'^PACKAGE = \("[^"]+", "([^"]+)"\)(?:  # v(\S+))?', source, re.MULTILINE).groups()
    return tag or version


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_versions_are_those_that_run(row):
    name, target = re.fullmatch(r"\[(.+)\]\((.+)\)", row[0]).groups()
    versions = re.findall(r"\b\d+\.\d+\.\d+\b", row[1])
    if target.startswith("#"):
        assert versions
        assert set(versions) <= set(pins(name.lower()))
    elif name != "a loop of your own":
        found = page_package(Path(target).stem)
        assert [found] == versions or found.startswith(re.fullmatch("commit `(.+)`", row[1])[1])
    if name == "AReaL":
        assert versions == pins("areal")


def test_versions_in_the_text_are_those_of_the_matrix():
    for package, version in re.findall(r"\b(TRL|axolotl|ms-swift) (\d+\.\d+\.\d+)", TEXT):
        allowed = {"TRL": ["1.15.0", "0.29.1"]}.get(package, [])  # named as those that fail, or come with ms-swift
        assert version in [*pins(package.lower()), *allowed], (package, version)
    for package, version in re.findall(r"pip install (\S+)==(\S+)", TEXT):
        assert [version] == pins(package)


def test_rows_of_the_matrix_exist():
    rows = re.search(r"^all=\((.*?)\)", MATRIX, re.DOTALL | re.MULTILINE)[1].split()
    told = TEXT.split("`bash tests/matrix.sh python3 ", 1)[1].split("\n## ")[0]
    named = [told.split("`")[0], *re.findall(r"`([a-z]+(?:-[a-z]+)*)`", told.split("`", 1)[1])]
    assert len(named) == 7
    assert set(named) <= set(rows)


@pytest.mark.parametrize("spelled", re.findall(rf'{VARIABLE}="([^"]*)"', TEXT))
def test_settings_parse(spelled, monkeypatch):
    monkeypatch.setenv(VARIABLE, spelled)
    settings = settings_from_environment()
    assert settings.mode == "coupled"
    assert settings.gamma_amp == 1.5
    assert settings.horizon == (10, 100)


def test_the_yaml_names_our_trainer():
    (text,) = blocks("yaml")
    options = yaml.safe_load(text)
    assert options["rl"] == "grpo"
    module, _, name = options["trainer_cls"].rpartition(".")
    tree = ast.parse(Path(find_spec(module).origin).read_text(encoding="utf-8"))
    assert name in [node.name for node in tree.body if isinstance(node, ast.ClassDef)]


def test_the_plug_in_is_there_and_refuses_what_the_page_names():
    line = re.search(r'echo "import (.+?)" > (\S+)\n.*--external_plugins (\S+) ', TEXT, re.DOTALL)
    assert find_spec(line[1])
    assert line[2] == line[3]
    refusals = "".join(path.read_text("utf-8") for path in (ROOT / "rhythm_kernels/integrations/ms_swift").glob("*.py"))
    told = re.search(r"Refused by the argument's name:\s(.*?) Not\s+tried", TEXT, re.DOTALL)[1]
    names = re.findall(r"`(\w+)(?:=\w+)?`", told)
    assert len(names) > 8
    assert [name for name in names if name not in refusals] == []


def test_groups_that_spare_the_forward(tmp_path):
    assert "`rk.head_groups(model, batches).save(path)`" in TEXT
    from .probe.probe_models import padded_batch, tiny_model

    model, path = tiny_model("qwen3"), tmp_path / "groups.json"
    rk.head_groups(model, [padded_batch()]).save(path)
    assert not rk.RhythmCredit(model, rk.RhythmSettings(groups=str(path))).calibration_due(0)


@pytest.fixture
def given(monkeypatch, tmp_path):
    """What the page's reader has, and a toy in the place of the hub's model and of hours of training."""
    trl = pytest.importorskip("trl")
    from rhythm_kernels.integrations import trl as ours

    from .integrations import toy

    def configured(kind):
        return lambda **named: kind(**{**toy.options(tmp_path, max_steps=1), **named, "output_dir": str(tmp_path)})

    def trainer(model, **named):
        assert model == "Qwen/Qwen3-0.6B"
        return whole(model=toy.build_model(), processing_class=toy.build_tokenizer(), **named)

    whole = ours.RhythmGRPOTrainer
    monkeypatch.setattr(ours, "RhythmGRPOConfig", configured(ours.RhythmGRPOConfig))
    monkeypatch.setattr(ours, "RhythmGRPOTrainer", trainer)
    needed = {"reward_funcs": toy.reward, "train_dataset": toy.dataset()}
    needed |= {"model": toy.build_model(), "processing_class": toy.build_tokenizer()}
    return {
        "my_reward": toy.reward,
        "my_dataset": toy.dataset(),
        "TheirGRPOTrainer": type("TheirGRPOTrainer", (trl.GRPOTrainer,), {}),
        "their_config": configured(trl.GRPOConfig)(),
        "needed": needed,
        "trl": trl,
    }


@pytest.mark.parametrize("index", [0, 1])
def test_the_trainers_of_trl_train(given, index, caplog, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    code = blocks("python")[index].replace("Mine(..., ", "Mine(**needed, ")
    with caplog.at_level(logging.INFO, logger="rhythm_kernels"):
        exec(compile(code, f"<{PAGE.name}>", "exec"), given)
        given["trainer"].train()
    name, trl = type(given["trainer"]).__name__, given["trl"]
    assert any(line.startswith(f"rhythm credit is on in {name} (TRL {trl.__version__}") for line in caplog.messages)
    assert any("mode=coupled, " in line for line in caplog.messages)
    assert any(line.endswith("attention is measured in the training forward") for line in caplog.messages)
    logged = given["trainer"].state.log_history[0]
    for metric in re.findall(r"`(rhythm/\w+)`", TEXT):
        assert logged[metric] > 0
    assert logged["rhythm/gamma_mean"] > 1
