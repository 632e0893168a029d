"""Accuracy on held-out instances: responses are drawn, judged by the task, and counted.

The sampled responses come in this order: the first to every instance, the instances with short prompts first; then the
further ones to the same instances, as one list that is by length again. Each kind, sampled and greedy, draws from one
stream of random numbers that begins at `eval.seed`. So the first responses of `eval.samples: 16` are those of
`eval.samples: 1`, as long as `eval.batch_size` is the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from tqdm.auto import tqdm

from ..recipe import Eval, Recipe, half_precision
from ..settings import RecipeError
from ..task import CORRECTNESS, Asked, Instance, Task, asked
from .generate import Decoding, answer, by_length, ends, random_state, random_stream
from .record import Record
from .summary import KINDS, Evaluation, Response

Progress = Callable[[int, int], Any]  # told how many more responses there are, and how many of them are right


def limit(recipe: Recipe) -> int:
    """The longest response of an evaluation, in tokens."""
    return recipe.eval.max_tokens or recipe.grpo.max_completion_length


def samples_of(instances: Sequence[Instance], samples: int | Mapping[str, int]) -> list[int]:
    """How often each instance is answered: `eval.samples`, which may be by test set; a set not named there once.

    Raises:
        RecipeError: for a name that no instance's `set` has.
    """
    if isinstance(samples, int):
        return [samples] * len(instances)
    known = sorted({str(instance["set"]) for instance in instances if "set" in instance})
    for name in samples:
        if name not in known:
            sets = (
                f"name test sets of the task ({', '.join(known)})"
                if known
                else "be a number: the task has no test sets"
            )
            raise RecipeError(f"eval.samples must {sets}, got {name!r}")
    return [samples.get(str(instance.get("set")), 1) for instance in instances]


def batches(prompts: Sequence[str], samples: Sequence[int], batch_size: int) -> list[list[tuple[int, int]]]:
    """(instance, sample) of every response, in the batches and the order in which they are drawn."""
    first = [[(i, 0) for i in chosen] for chosen in by_length(prompts, batch_size)]
    further = [(i, sample) for i, count in enumerate(samples) for sample in range(1, count)]
    chosen = by_length([prompts[i] for i, _ in further], batch_size)
    return first + [[further[at] for at in batch] for batch in chosen]


def evaluate(
    model: Any,
    tokenizer: Any,
    task: Task,
    instances: Sequence[Instance],
    settings: Eval,
    *,
    max_new_tokens: int,
    temperature: float,
    kind: str = "sampled",
    record: Record | None = None,
    rewards: Sequence[str] = (CORRECTNESS,),
    progress: Progress = lambda done, right: None,
) -> Evaluation:
    """Answer every instance and judge the answers.

    Args:
        temperature: 0 is greedy: one response an instance, whatever `eval.samples` says.
        record: where responses are kept; those that it holds already are not drawn again.
        rewards: of the task, by name; each is asked once a batch.
    """
    started = time.perf_counter()
    prompts = asked(task, instances, tokenizer)
    decoding = Decoding(max_new_tokens, temperature, settings.top_p, settings.top_k)
    samples = samples_of(instances, settings.samples if temperature > 0 else 1)
    kept = [line for line in record.lines if line["kind"] == kind] if record else []
    found = [_of_line(line) for line in kept]
    if found:
        progress(len(found), sum(response.correct for response in found))
    start = record.random if record and record.random and found else settings.seed
    with random_stream(model.device, start):
        done = 0
        for batch in batches([prompt.text for prompt in prompts], samples, settings.batch_size):
            done += len(batch)
            if done <= len(kept):
                continue
            tokens = answer(model, tokenizer, [prompts[i].tokens for i, _ in batch], decoding)
            responses = _judged(tokens, batch, model, tokenizer, task, instances, rewards)
            found += responses
            if record:
                lines = [_line(response, kind, instances, prompts) for response in responses]
                record.add(lines, random_state(model.device))
            progress(len(responses), sum(response.correct for response in responses))
    found.sort(key=lambda response: (response.instance, response.sample))
    totals: dict[str, int] = {}
    for response in found:
        for name, value in task.counts(response.text, instances[response.instance]).items():
            totals[name] = totals.get(name, 0) + value
    figures = task.figures(totals, len(found), sum(response.correct for response in found))
    sets = [str(instance["set"]) for instance in instances] if all("set" in i for i in instances) else []
    return Evaluation(found, sets, figures, time.perf_counter() - started)


def _judged(
    tokens: Sequence[list[int]],
    batch: Sequence[tuple[int, int]],
    model: Any,
    tokenizer: Any,
    task: Task,
    instances: Sequence[Instance],
    rewards: Sequence[str],
) -> list[Response]:
    """The responses of a batch, each with its rewards."""
    end = ends(model, tokenizer)
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    questions = [instances[i] for i, _ in batch]
    judges = task.rewards
    judged = {name: [float(reward) for reward in judges[name](texts, questions)] for name in rewards}
    return [
        Response(
            instance=i,
            sample=sample,
            text=texts[at],
            length=len(tokens[at]),
            finished=bool(tokens[at]) and tokens[at][-1] in end,
            rewards={name: values[at] for name, values in judged.items()},
            tokens=tokens[at],
        )
        for at, (i, sample) in enumerate(batch)
    ]


def _line(response: Response, kind: str, instances: Sequence[Instance], prompts: Sequence[Asked]) -> dict[str, Any]:
    """A response as a line of `responses.jsonl`."""
    instance = instances[response.instance]
    return {
        "instance": response.instance,
        **({"set": instance["set"]} if "set" in instance else {}),
        "kind": kind,
        "sample": response.sample,
        "prompt": prompts[response.instance].text,
        "response": response.text,
        "tokens": response.length,
        "finished": response.finished,
        "rewards": response.rewards,
        "correct": response.correct,
    }


def _of_line(line: Mapping[str, Any]) -> Response:
    return Response(
        line["instance"], line["sample"], line["response"], line["tokens"], line["finished"], line["rewards"]
    )


def evaluate_both(
    model: Any,
    tokenizer: Any,
    task: Task,
    instances: Sequence[Instance],
    recipe: Recipe,
    when: str,
    record: Record | None = None,
    rewards: Sequence[str] = (CORRECTNESS,),
) -> dict[str, Evaluation]:
    """Evaluate twice: sampled, `eval.samples` responses to every instance, and greedy, one to each."""
    results = {}
    for kind, temperature in zip(KINDS, (recipe.eval.temperature, 0.0)):
        count = sum(samples_of(instances, recipe.eval.samples if temperature > 0 else 1))
        with _bar(f"{when}, {kind}", count) as progress, autocast(recipe, model.device):
            results[kind] = evaluate(
                model,
                tokenizer,
                task,
                instances,
                recipe.eval,
                max_new_tokens=limit(recipe),
                temperature=temperature,
                kind=kind,
                record=record,
                rewards=rewards,
                progress=progress,
            )
    return results


def autocast(recipe: Recipe, device: torch.device) -> AbstractContextManager[Any]:
    """The precision that a training step computes in: before training too, when the trainer has not set it yet."""
    kind = half_precision(recipe)
    return nullcontext() if kind is None else torch.autocast(device.type, kind)


@contextmanager
def _bar(name: str, total: int) -> Iterator[Progress]:
    """Responses done of all, the time that is left, and the share that is right."""
    with tqdm(total=total, desc=f"{name:16}", unit="answer", dynamic_ncols=True) as bar:
        right = 0

        def progress(more: int, of_them_right: int) -> None:
            nonlocal right
            right += of_them_right
            bar.set_postfix({"right": f"{right / (bar.n + more):.1%}"}, refresh=False)
            bar.update(more)

        yield progress
