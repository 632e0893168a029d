"""Responses on disk, line by line, so that an evaluation that was cut off at any moment goes on where it was.

Two files: `responses.jsonl`, to which a batch's responses are appended, and `responses.state`, which says how many
bytes of it are valid and where the random numbers were. The state is replaced, in one rename, only when the batch's
lines are on the disk: whatever is cut off between leaves bytes after the valid ones, which the next start cuts off.

The state also says of what these are the responses (see `Identity`). Those of anything else are neither continued nor,
unless told to, removed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..folder import EVALUATION, RESPONSES, STATE, saving, write_text
from ..reading import differs, misfit, read_json
from ..settings import RecipeError

Identity = Mapping[str, Any]  # what is evaluated, in JSON's values: two evaluations are one if these are equal


class Record:
    """The responses in a folder.

    Args:
        folder: made when the first batch is written.
        identity: what is evaluated.
        overwrite: whether what another evaluation left there is removed when the first batch is written.

    Attributes:
        lines: the valid responses, in order.
        random: where the random numbers were after the last of them; None before the first.

    Raises:
        RecipeError: where the folder holds another evaluation, or a file that no evaluation wrote.
    """

    def __init__(self, folder: Path, identity: Identity, overwrite: bool = False) -> None:
        self.path, self._state = folder / RESPONSES, folder / STATE
        self._identity = json.loads(json.dumps(identity))
        self._begun = self._clear = False
        self._forget()
        try:
            self._read()
        except RecipeError:
            if not overwrite:
                raise
            self._forget()
            self._clear = True

    def _forget(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.random: dict[str, str] | None = None
        self._valid, self._hash = 0, hashlib.sha256()  # bytes, and of them

    def _read(self) -> None:
        """Take over what was left here."""
        if not self._state.exists():
            evaluation = self.path.parent / EVALUATION
            if found := [path for path in (evaluation, self.path) if path.exists()]:
                known = _identity(evaluation)
                change = f": {differs(known, self._identity)}" if known else ", it does not say of what"
                raise RecipeError(f"{found[0]} is of another evaluation{change}{_ADVICE}")
            return
        try:
            state = read_json(self._state.read_text(encoding="utf-8"))
            said = misfit(state, {"bytes": int, "sha256": str, "identity": {}})
        except ValueError as error:
            said = str(error)
        if said:
            raise RecipeError(f"{self._state} cannot be read: {said}{_ADVICE}")
        if change := differs(state["identity"], self._identity):
            raise RecipeError(f"{self.path} is of another evaluation: {change}{_ADVICE}")
        content = self.path.read_bytes()[: state["bytes"]] if self.path.exists() else b""
        self._hash = hashlib.sha256(content)
        if self._hash.hexdigest() != state["sha256"]:
            raise RecipeError(f"{self.path} is not what this evaluation wrote{_ADVICE}")
        self._valid, self.random = state["bytes"], state.get("random")
        self.lines = [read_json(line) for line in content.decode("utf-8").split("\n")[:-1]]

    def add(self, lines: Sequence[Mapping[str, Any]], random: Mapping[str, str]) -> None:
        """Append the responses of a batch, after which the random numbers are where `random` says."""
        self._begin()
        # A lone surrogate, which UTF-8 has not, becomes \udXXX, which is how JSON writes it.
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        content = text.encode("utf-8", "backslashreplace")
        with saving(self.path), self.path.open("ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self.lines += map(dict, lines)
        self.random, self._valid = dict(random), self._valid + len(content)
        self._hash.update(content)
        self._save()

    def finish(self, evaluation: str) -> None:
        """Write `evaluation.json`, which holds the identity too, and remove the state, which nothing needs any more."""
        self._begin()
        write_text(self.path.parent / EVALUATION, evaluation)
        self._state.unlink()

    def _begin(self) -> None:
        """Make the folder ready for this evaluation's next line."""
        if self._begun:
            return
        folder = self.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        if self._clear:
            for path in (folder / EVALUATION, self._state, self.path):  # without its state a file is nobody's
                path.unlink(missing_ok=True)
        if self._valid == 0:
            self._save()  # before the file, so that an empty one is never found without it
        with self.path.open("ab") as file:
            file.truncate(self._valid)
        self._begun = True

    def _save(self) -> None:
        found = {"bytes": self._valid, "sha256": self._hash.hexdigest()}
        state = found | {"random": self.random, "identity": self._identity}
        write_text(self._state, json.dumps(state) + "\n")


_ADVICE = "; --overwrite removes it and begins anew, --output FOLDER leaves it"


def finished(folder: Path, identity: Identity) -> dict[str, Any] | None:
    """The finished evaluation in `folder`, if it is the one of `identity`."""
    path = folder / EVALUATION
    if _identity(path) != json.loads(json.dumps(identity)):
        return None
    (folder / STATE).unlink(missing_ok=True)  # left where the evaluation was cut off at its very end
    return read_json(path.read_text(encoding="utf-8"))


def _identity(path: Path) -> dict[str, Any] | None:
    """Of what a finished evaluation is; None where it does not say so, or is not there."""
    try:
        found = read_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found["identity"] if not misfit(found, {"identity": {}}) else None
