"""The sets of reasoning_gym as a task: which are taken, splits, the judgement of answers, and of hostile ones."""

import importlib.util
import json
import random
import time

import pytest

from training import task
from training.settings import RecipeError
from training.tasks import reasoning_gym
from training.tasks.reasoning_gym import ReasoningGym, answer_of, questions
from training.tasks.reasoning_gym.questions import split_of


@pytest.fixture(scope="module", autouse=True)
def _end_processes():
    yield
    questions.end_processes()


def made(dataset: str, **settings) -> ReasoningGym:
    return ReasoningGym(ReasoningGym.Settings("reasoning_gym", dataset=dataset, **settings))


def answered(instances: list[dict]) -> list[str]:
    return [f"So it is <answer>{one['answer']}</answer>." for one in instances]


SETS = {
    "countdown": {"max_numbers": 4},
    "gsm_symbolic": {},
    "chain_sum": {},
    "zebra_puzzles": {"num_people": 3, "num_characteristics": 3},
    "arc_agi": {},  # whose scorer reads tuples, which JSON has not
    "acre": {},  # which makes all questions of a seed at once
    "composite": {"datasets": [{"name": "lcm"}, {"name": "gcd", "weight": 3, "config": {"max_numbers": 2}}]},
}


@pytest.mark.parametrize(("dataset", "options"), SETS.items(), ids=SETS)
def test_sets_are_judged_by_their_own_scorers(dataset: str, options: dict) -> None:
    gym = made(dataset, options=options)
    instances = gym.instances("train", 6) + gym.instances("test", 2)
    copies = json.loads(json.dumps(instances))
    assert copies == instances
    assert gym.rewards["correctness"](answered(copies), copies) == [1.0] * 8
    assert gym.rewards["score"](answered(copies), copies) == [1.0] * 8
    wrong = ["<answer>what?</answer>"] * 8
    assert gym.rewards["correctness"](wrong, copies) == [0.0] * 8
    assert max(gym.rewards["score"](wrong, copies)) < 0.5
    assert gym.correct(answered(copies)[0], copies[0])
    # Another process has the instances from a file, and not the task that drew them
    gym._entries.clear()
    assert gym.rewards["score"](answered(copies), copies) == [1.0] * 8


@pytest.mark.parametrize(
    ("dataset", "settings", "said"),
    [
        ("propositional_logic", {}, "score 1, got 'propositional_logic', which gives no answer to its question 1"),
        ("zebra_puzzle", {}, "dataset must be a set of reasoning_gym, got 'zebra_puzzle': did you mean zebra_puzzles"),
        ("qqqqqqqq", {}, "dataset must be a set of reasoning_gym, got 'qqqqqqqq': known: ab, acre"),
        ("", {}, "dataset must be the name of a set"),
        ("lcm", {"options": {"seed": 3}}, "options must not hold seed, .*: task.seed says it"),
        ("lcm", {"options": {"size": 3}}, "options must not hold size"),
        ("lcm", {"options": {"numbers": 3}}, "options must hold only min_numbers, .* for lcm, got {'numbers': 3}"),
        ("lcm", {"options": {"min_numbers": 9}}, "options must be what lcm takes, got .*: AssertionError: max_numbers"),
        ("lcm", {"options": {"min_numbers": "x"}}, "options must be what lcm takes, got .*: TypeError"),
        ("lcm", {"options": {"min_numbers": {1}}}, "options must hold what JSON has"),
        ("composite", {}, "options must be what composite takes, .* Must specify at least one dataset"),
        ("lcm", {"prompt": "Well?"}, "prompt must be base, chat, or text that holds {question}, got 'Well"),
    ],
)  # fmt: skip
def test_what_is_refused_and_why(dataset: str, settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("{", r"\{").replace("}", r"\}")):
        made(dataset, **settings)


def test_a_set_whose_answers_score_less_is_refused_with_score_and_question(monkeypatch) -> None:
    def ask(what, requests, *rest):
        replies = questions.ask(what, requests, *rest)
        return [1.0, 0.25, *replies[2:]] if what == "score" else replies

    monkeypatch.setattr(reasoning_gym, "ask", ask)
    with pytest.raises(ValueError, match=r"got 'lcm', which scores 0\.25 for its own answer to question 2"):
        made("lcm")


def test_splits_share_no_question_and_are_always_the_same() -> None:
    sizes = {"train": 200, "validation": 40, "test": 40}
    gym, other = made("lcm"), made("lcm")
    parts = {split: gym.instances(split, size) for split, size in sizes.items()}
    for split in reversed(sizes):  # in another order, from the shorter to the longer
        other.instances(split, 5)
        assert other.instances(split, sizes[split]) == parts[split]
        assert gym.instances(split, 7) == parts[split][:7]
    texts = {split: [one["question"] for one in part] for split, part in parts.items()}
    assert {split: len(set(part)) for split, part in texts.items()} == sizes
    assert all(split_of(text) == split for split, part in texts.items() for text in part)
    assert made("lcm", seed=1).instances("test", 5) != parts["test"][:5]


def test_questions_that_hang_on_the_hash_seed_are_the_same_everywhere(monkeypatch) -> None:
    first = made("ransom_note").instances("train", 5)
    questions.end_processes()
    monkeypatch.setenv("PYTHONHASHSEED", "77")
    assert made("ransom_note").instances("train", 5) == first


def test_a_pool_that_is_too_small_is_refused_with_its_size() -> None:
    one_digit = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    gym = made("chain_sum", options=one_digit)
    with pytest.raises(
        ValueError, match=r"at least 500 different questions for test, got chain_sum with (\d+)"
    ) as said:
        gym.instances("test", 500)
    assert gym._questions._drawn < 10_000
    count = int(str(said.value).split(" with ")[1].split(":")[0])
    assert 5 < count < 100
    assert len(gym.instances("test", count)) == count


@pytest.mark.parametrize(("split", "said"), [("train", "train_size must be"), ("test", "the size must be")])
def test_a_set_has_no_end(split: str, said: str) -> None:
    with pytest.raises(ValueError, match=said + " a number, got None: the questions of lcm have no end"):
        made("lcm").instances(split, None)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<answer>1</answer> then <answer> 2\n</answer> end", "2"),
        ("<answer>1</answer> then <answer>2", "1"),
        ("<answer>1</answer> </answer>", "1"),
        ("<answer>1 <answer>2</answer>", "2"),
        ("<answer></answer>", ""),
        ("answer 7", None),
        ("</answer><answer>", None),
        ("", None),
    ],
)
def test_which_answer_is_read(response: str, expected: str | None) -> None:
    assert answer_of(response) == expected


def test_format_and_figures() -> None:
    gym = made("lcm")
    (one,) = gym.instances("train", 1)
    responses = [*answered([one]), "<answer>x</answer>", "no", "<answer> </answer>"]
    assert gym.rewards["format"](responses, [one] * 4) == [1.0, 1.0, 0.0, 0.0]
    assert [gym.counts(response, one)["answered"] for response in responses] == [1, 1, 0, 0]
    figures = gym.figures({"answered": 2}, 3, right=1)
    assert [figures[key].value for key in ("answered", "right_of_answered")] == [2 / 3, 1 / 2]
    assert all(figure.value == 0 for figure in gym.figures({}, 0, 0).values())


def test_prompts_and_words() -> None:
    gym = made("lcm")
    (one,) = gym.instances("train", 1)
    (message,) = gym.prompt(one)
    assert message["role"] == "user"
    assert one["question"] in message["content"]
    assert "<answer>" in message["content"]
    assert one["question"] in made("lcm", prompt="base").prompt(one)
    assert made("lcm", prompt="{question} {x}").prompt(one) == one["question"] + " {x}"
    assert gym.describe() == "lcm of reasoning_gym"
    assert gym.label(one).startswith(f"{one['number']}: ")


def test_an_instance_of_other_options_is_not_judged() -> None:
    gym = made("lcm")
    (one,) = gym.instances("train", 1)
    for other in (one | {"question": "How much?"}, one | {"number": one["number"] + 1}):
        with pytest.raises(ValueError, match="an instance must be a question of lcm with the same options"):
            gym.correct("<answer>1</answer>", other)


PIECES = [
    *("<answer>", "</answer>", "1", "-", "+", "*", "(", ")", "[", "]", "{", "}", ",", ".", "'", '"', "\\", "\n", " "),
    *("nan", "inf", "1e999", "None", "9" * 60, "\ud800", "\x00", "\u0663", "x", "lambda", "import os", "__", "=", "/0"),
]  # fmt: skip


def hostile(count: int) -> list[str]:
    rng = random.Random(0)
    inside = ("".join(rng.choices(PIECES, k=rng.choice((1, 5, 50)))) for _ in range(count))
    return [text if rng.random() < 0.1 else f"<answer>{text}</answer>" for text in inside]


@pytest.mark.parametrize("dataset", ["chain_sum", "n_queens", "number_sorting"])
def test_hostile_answers(dataset: str) -> None:
    gym = made(dataset)
    (one,) = gym.instances("train", 1)
    scores = gym.rewards["score"](hostile(10_000), [one] * 10_000)
    assert all(0.0 <= score < 1.0 for score in scores)


@pytest.mark.long
@pytest.mark.parametrize("dataset", ["countdown", "polynomial_multiplication", "simple_integration", "puzzle24"])
def test_hostile_answers_to_scorers_that_use_sympy(dataset: str, monkeypatch) -> None:
    monkeypatch.setattr(reasoning_gym, "SECONDS", 1.0)
    gym = made(dataset)
    (one,) = gym.instances("train", 1)
    scores = gym.rewards["score"](hostile(10_000), [one] * 10_000)
    assert all(0.0 <= score < 1.0 for score in scores)


@pytest.mark.parametrize(
    "text", ["<answer>" * 100_000, "</answer>" * 100_000, "<answer>" + "[" * 500_000 + "</answer>"]
)
def test_long_text_is_not_scored(text: str) -> None:
    gym = made("n_queens")
    (one,) = gym.instances("train", 1)
    begin = time.monotonic()
    assert gym.rewards["score"]([text], [one]) == [0.0]
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize("dataset", ["n_queens", "string_insertion", "countdown", "polynomial_multiplication"])
def test_an_answer_is_never_run_as_a_program(dataset: str, tmp_path) -> None:
    gym = made(dataset, options={"max_numbers": 4} if dataset == "countdown" else {})
    (one,) = gym.instances("train", 1)
    mark = tmp_path / "mark"
    touch = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    forms = (touch, f"[{touch}]", f"1 + len(str({touch}))", f"exec({touch!r})", f"open({str(mark)!r}, 'w')")
    assert max(gym.rewards["score"]([f"<answer>{form}</answer>" for form in forms], [one] * len(forms))) < 0.5
    assert not mark.exists()


def test_an_answer_that_takes_forever_costs_its_own_score_alone(monkeypatch) -> None:
    monkeypatch.setattr(reasoning_gym, "SECONDS", 0.5)
    gym = made("countdown", options={"max_numbers": 4})
    instances = gym.instances("train", 3)
    responses = answered(instances)
    responses[1] = "<answer>9**9**9**9</answer>"
    begin = time.monotonic()
    assert gym.rewards["score"](responses, instances) == [1.0, 0.0, 1.0]
    assert time.monotonic() - begin < 30


def test_the_task_is_found_by_name_and_its_errors_are_the_recipe_s() -> None:
    assert task.find("reasoning_gym") is ReasoningGym
    with pytest.raises(RecipeError, match=r"^task\.dataset must be a set that gives its own answers"):
        task.make(ReasoningGym.Settings("reasoning_gym", dataset="propositional_logic"))


def test_a_package_that_is_missing_is_one_line(monkeypatch, capsys) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "reasoning_gym" else there(name))
    with pytest.raises(RecipeError, match=r'^task\.name must be .*, got .reasoning_gym.: pip install "rhythm-kernels'):
        task.make(ReasoningGym.Settings("reasoning_gym", dataset="lcm"))
