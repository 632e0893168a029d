"""Whether answers are right, by math-verify in processes that can be killed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ...judges import Lost, Pool
from .answers import DEEPEST, depth

WORKER = Path(__file__).with_name("worker.py")
_REMEMBERED = 1 << 14  # verdicts


class Request(NamedTuple):
    """A question of equality.

    Attributes:
        gold: answers of which one must be met.
        answer: what was answered.
        boxed: whether `answer` is an answer alone, not text to find one in.
    """

    gold: tuple[str, ...]
    answer: str
    boxed: bool


Verdict = bool | Lost


class Judge:
    """Answers requests, the same ones once: the responses of a group give few answers.

    Args:
        workers: processes, at most.
        timeout: seconds of a processor that an answer may take.
    """

    def __init__(self, workers: int, timeout: float) -> None:
        self.pool = Pool(WORKER, workers, timeout)
        self._known: OrderedDict[Request, Verdict] = OrderedDict()

    def verdicts(self, requests: Sequence[Request]) -> list[Verdict]:
        """Right or wrong, or why it could not be judged, of each request."""
        known = {request: self._at_sight(request) for request in requests}
        asked = [request for request, verdict in known.items() if verdict is None]
        replies = self.pool.judge(asked) if asked else []
        known.update((one, reply or False) for one, reply in zip(asked, replies))  # None where the judge raised
        for request, verdict in known.items():  # of which the newest are kept
            self._known[request] = verdict
            self._known.move_to_end(request)
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return [known[request] for request in requests]

    def _at_sight(self, request: Request) -> Verdict | None:
        """The verdict where nothing needs to be computed: for equal text, for none, and for a maze of brackets."""
        given = "".join(request.answer.split())
        if not given or depth(given) > DEEPEST:
            return False
        if request.boxed and given in {"".join(one.split()) for one in request.gold}:
            return True
        return self._known.get(request)
