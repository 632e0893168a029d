"""What a process that judges answers does with a request (`training/serve.py`); imports nothing but math-verify."""

from math_verify import parse, verify


def answer(request: list) -> bool:
    """Whether `[gold, answer, boxed]`, as in `verdicts.Request`, is right; raises for some texts that are not."""
    gold, given, boxed = request
    found = _parse(f"\\boxed{{{given}}}" if boxed else given)
    return any(verify(_parse(f"\\boxed{{{one}}}"), found, timeout_seconds=None) for one in gold)


def _parse(text: str) -> list:
    return parse(text, parsing_timeout=None)
