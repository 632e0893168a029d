"""How Countdown is asked: for a base model, for an instruct model, and for the tiny model that ships here."""

from collections.abc import Sequence

_QUESTION = (
    "Here are some numbers: {numbers}. Combine all of them into one arithmetic expression whose value is "
    "{target}. You may use + - * / and parentheses, and every number exactly once. Think step by step "
    "between <think> and </think>, then give only the expression between <answer> and </answer>, for example "
    "<answer>(3 + 5) * 2</answer>."
)
_THINK = "I will work through this one step at a time.\n<think>"


def base_prompt(numbers: Sequence[int], target: int) -> str:
    """The prompt for a base model: a short dialogue that stops inside the assistant's thoughts."""
    question = _QUESTION.format(numbers=", ".join(map(str, numbers)), target=target)
    return (
        "What follows is a dialogue. A user poses a puzzle; the assistant reasons first and then answers.\n"
        f"User: {question}\nAssistant: {_THINK}"
    )


def chat_prompt(numbers: Sequence[int], target: int) -> list[dict[str, str]]:
    """The prompt for an instruct model, as chat messages: the tokenizer's own chat template does the rest."""
    question = _QUESTION.format(numbers=", ".join(map(str, numbers)), target=target)
    return [{"role": "user", "content": question}]


# Three wordings of different length, so that a batch of tiny prompts is really padded (7 to 12 tokens).
_TINY_WORDINGS = ("nums", "make", "use")


def tiny_prompt(numbers: Sequence[int], target: int) -> str:
    """The tiny model's prompt, one token a word; the instance chooses the wording, so it is always the same.

    `nums 2 11 7 target 6 :`, `make 6 from 2 11 7 :` or `use 2 , 11 , 7 to make 6 :`
    """
    wording = _TINY_WORDINGS[(sum(numbers) + target) % len(_TINY_WORDINGS)]
    if wording == "nums":
        return f"nums {' '.join(map(str, numbers))} target {target} :"
    if wording == "make":
        return f"make {target} from {' '.join(map(str, numbers))} :"
    return f"use {' , '.join(map(str, numbers))} to make {target} :"
