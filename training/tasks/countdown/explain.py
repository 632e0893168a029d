"""What a change of accuracy is made of, from counts of search traces: longer search, or better aim."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...task import Figure


def figures(totals: Mapping[str, int], responses: int, right: int) -> dict[str, Figure]:
    """Figures of all responses together, from the sums of `trace.analyse`."""
    equations, verdicts = max(1, totals["equations"]), max(1, totals["verdicts"])
    return {
        "equations": Figure("equations a response", totals["equations"] / responses),
        "attempts": Figure("attempts a response (a last equation with a verdict)", totals["verdicts"] / responses),
        "right_an_attempt": Figure("right answers an attempt", right / verdicts, share=True),
        "arithmetic": Figure("equations with right arithmetic", totals["right_arithmetic"] / equations, share=True),
        "verdicts": Figure("verdicts (lo, hi, ok) that are right", totals["right_verdicts"] / verdicts, share=True),
        "answered": Figure(
            "responses that end in an answer, or give up in words", totals["answered"] / responses, share=True
        ),
        "gave_up": Figure("responses that give up", totals["gave_up"] / responses, share=True),
    }


def remark(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Accuracy is attempts a response times right answers an attempt, so logarithms of the ratios add up."""
    both = [summary | {k: f["value"] for k, f in summary["figures"].items()} for summary in (before, after)]
    keys = ("accuracy", "attempts", "right_an_attempt")
    factors = [tuple(summary.get(key, 0) for summary in both) for key in keys]
    if any(b <= 0 or a <= 0 for b, a in factors):
        return ""
    total, search, aim = (math.log(a / b) for b, a in factors)
    (right, now_right), (attempts, now_attempts), (an_attempt, now_an_attempt) = factors
    identity = (
        f"Accuracy is attempts a response times right answers an attempt: {attempts:.2f} times {an_attempt:.1%} = "
        f"{right:.1%} before, {now_attempts:.2f} times {now_an_attempt:.1%} = {now_right:.1%} after."
    )
    if abs(total) < 0.02:
        return identity
    if search * aim < 0:
        more, less = ("longer search", "aim") if (search > 0) == (total > 0) else ("better aim", "search")
        verdict = f"The change is {more}, partly undone by {'shorter' if less == 'search' else 'worse'} {less}."
        if total < 0:
            verdict = "The two moved in opposite directions."
    else:
        verdict = (
            f"In logarithms, which add up, {search / total:.0%} of the change is how long the model searches and "
            f"{aim / total:.0%} is how well an attempt is aimed."
        )
    return f"{identity} {verdict}"
