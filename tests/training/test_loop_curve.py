"""The chart of what the reference loops print."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from training.pages.loop_curve import chart, read

LINES = "step 1  reward 0.5  tokens 65\nstep 2  reward 0.25  tokens 70\n"


def test_a_line_for_each_file(tmp_path):
    for name in ("plain", "a<b"):
        (tmp_path / f"{name}.txt").write_text(LINES)
    runs = {name: read(tmp_path / f"{name}.txt", "tokens") for name in ("plain", "a<b")}
    assert runs["plain"] == [(1, 65), (2, 70)]
    drawn = ElementTree.fromstring(chart(runs, "tokens"))  # a file that stands alone: well formed, with its name space
    space = "{http://www.w3.org/2000/svg}"
    assert len(drawn.findall(f"{space}polyline")) == 2
    assert [text.text for text in drawn.iter(f"{space}text")][-2:] == ["plain", "a<b"]
    assert drawn.get("aria-label") == "tokens by step"


@pytest.mark.parametrize("names", ["abcdef", ["uniform", "coupled", "a name of many letters"]])
def test_the_names_of_many_runs_are_in_the_picture(names):
    drawn = ElementTree.fromstring(chart({name: [(1, 0.5), (2, 0.6)] for name in names}, "reward"))
    said = [text for text in drawn.iter("{http://www.w3.org/2000/svg}text") if text.text in names]
    assert len(said) == len(names)
    ends = {(text.get("y"), float(text.get("x")), float(text.get("x")) + 6 * len(text.text)) for text in said}
    for y, start, end in ends:
        assert end <= 320 and not any(
            y == other and start <= begin < end for other, begin, _ in ends - {(y, start, end)}
        )


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (LINES + "Traceback\n", "lines must have step and loss, got 'step 1  reward 0.5  tokens 65'"),
        ("", "it must hold a line for each step, got none"),
    ],
)
def test_what_is_no_such_file(tmp_path, lines, message):
    path = tmp_path / "run.txt"
    path.write_text(lines)
    with pytest.raises(ValueError, match=r"run\.txt") as error:
        read(path, "loss")
    assert str(error.value) == f"{path}: {message}"
