"""Answers judged in processes of their own: what is right, and that no text holds up or ends the caller."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from training.judges import Lost, Pool
from training.tasks.maths import Maths
from training.tasks.maths.answers import gold
from training.tasks.maths.verdicts import WORKER, Request

from .hostile import hostile

ROOT = Path(__file__).parents[2]
# A text of which math-verify does not come back in minutes
SLOW = Request(("1",), "(10^{9})!", True)
EASY = [Request(("1/2",), "0.5", True), Request(("1/2",), "0.6", True)]
SAID = [True, False]


@pytest.fixture(scope="module")
def pool():
    pool = Pool(WORKER, workers=1, timeout=5.0)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def lenient():
    task = Maths(Maths.Settings("maths", boxed_only=False, timeout=3.0))
    yield task
    task.close()


def processes(pool):
    return [worker._process for worker in pool._workers if worker]


def alive(pid):
    """Whether a process runs; a zombie does not count as ended here."""
    return Path(f"/proc/{pid}").exists()


def judged(task, right, response):
    return task.rewards["correctness"]([response], [{"question": "", "answer": [right]}])[0]


@pytest.mark.parametrize(
    ("right", "response", "score"),
    [
        ("18", "so \\boxed{18}", 1),
        ("18", "so \\boxed{18.0} dollars", 1),
        ("18", "so $\\boxed{\\$18}$.", 1),
        ("18", "\\boxed{18.}", 1),
        ("18", "\\boxed{$18.00.$}", 1),
        ("18", "\\boxed{19}", 0),
        ("1234", "\\boxed{1,234}", 1),
        ("\\frac{1}{2}", "\\boxed{0.5}", 1),
        ("-\\frac12", "\\boxed{-1/2}", 1),
        ("3\\sqrt{13}", "\\boxed{\\sqrt{117}}", 1),
        ("(3,\\frac{\\pi}{2})", "\\boxed{\\left(3, \\pi/2\\right)}", 1),
        ("x^2-3x-10", "\\boxed{(x+2)(x-5)}", 1),
        ("\\text{Evelyn}", "\\boxed{Evelyn}", 1),
        ("69,84", "\\boxed{84, 69}", 1),
        ("025", "\\boxed{25}", 1),
        # Only the last box counts: guesses, echoes of the prompt, and boxes that do not close
        ("1", "\\boxed{1} \\boxed{2}", 0),
        ("2", "\\boxed{1} \\boxed{2}", 1),
        ("2", "$\\boxed{1}$, $\\boxed{2}$ and $\\boxed{3}$", 0),
        ("7", "".join(f"\\boxed{{{n}}} " for n in range(100)), 0),
        ("7", "\\boxed{1, 2, 3, 4, 5, 6, 7}", 0),
        ("7", "\\boxed{6 \\text{ or } 7}", 0),
        ("7", "\\boxed{\\boxed{7}}", 1),
        ("7", "\\boxed{7} or rather \\boxed{8", 0),
        ("7", "\\boxed{}", 0),
        ("7", "Put the final answer within \\boxed{}. It is 7.", 0),
        ("7", "7", 0),
        ("7", "", 0),
    ],
)
def test_answers(lenient, right, response, score):
    task = Maths(Maths.Settings("maths"))
    task._judge = lenient._judge
    assert judged(task, right, response) == score


@pytest.mark.parametrize(
    ("right", "response", "score"),
    [
        ("7", "The answer is 7.", 1),
        ("7", "Answer: $7$", 1),
        ("7", "3 + 4 = 7", 1),
        ("7", "7 and not 8", 0),
        ("1200", "4 * 300 = 1200\n#### 1,200", 1),
        ("1200", "#### 1200\n#### 7", 0),
        ("7", "#### 8\n7", 0),
        ("7", "7 \\boxed{8}", 0),
        ("7", "no idea", 0),
        ("7", "7" + " then words" * 1000, 0),  # an answer stands at the end
    ],
)
def test_answers_without_a_box_where_they_may_be(lenient, right, response, score):
    assert judged(lenient, right, response) == score


CASES = [json.loads(line) for line in (Path(__file__).with_name("math_verify_cases.jsonl")).open(encoding="utf-8")]


def test_the_cases_that_math_verify_publishes(lenient):
    """Its own cases of up to 140 characters and without special settings, from the folder `tests` of
    github.com/huggingface/Math-Verify at 5d148cf; where we differ from what it expects, the case says why."""
    assert len(CASES) > 150 and sum("why" in case for case in CASES) < 20
    scores = lenient.rewards["correctness"](
        [case["answer"] for case in CASES], [{"question": "", "answer": gold(case["gold"])} for case in CASES]
    )
    wrong = [case for case, score in zip(CASES, scores) if bool(score) != (case["theirs"] ^ ("why" in case))]
    assert not wrong


def test_replies_keep_the_order_of_requests():
    pool = Pool(WORKER, workers=3, timeout=5.0)
    requests = [Request((str(n),), f"{n + n % 2}.0", True) for n in range(150)]
    assert pool.judge(requests) == SAID * 75
    assert len(processes(pool)) == 3
    pool.close()


def test_a_late_answer_costs_itself_and_its_time():
    quick = Pool(WORKER, workers=1, timeout=1.0)
    quick.judge(EASY)
    before, begun = processes(quick)[0].pid, time.monotonic()
    assert quick.judge([*EASY, SLOW, *EASY]) == [*SAID, Lost.LATE, *SAID]
    assert 1.0 <= time.monotonic() - begun < 20
    assert not alive(before)  # ended, and no zombie
    quick.close()


def test_a_right_answer_is_right_on_a_busy_machine():
    """A worker that gets no processor for longer than the timeout, and one that gets none again in all its patience."""
    pool = Pool(WORKER, workers=1, timeout=0.5)
    pool.judge(EASY)
    first = processes(pool)[0]
    first.send_signal(signal.SIGSTOP)
    threading.Timer(1.5, first.send_signal, [signal.SIGCONT]).start()
    assert pool.judge(EASY) == SAID
    assert processes(pool)[0] is first
    pool._workers[0]._patience = 0.2
    first.send_signal(signal.SIGSTOP)
    assert pool.judge(EASY) == SAID
    assert processes(pool)[0] is not first
    pool.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are Linux's")
def test_the_memory_of_workers_is_limited(pool):
    """The system keeps to the limit; here it is so low that each answer is a worker's last, before it is too full."""
    pool.judge(EASY)
    taken = int(Path(f"/proc/{processes(pool)[0].pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    small = Pool(WORKER, workers=1, timeout=60.0, memory=int(1.8 * taken))
    small.judge(EASY[:1])
    first = processes(small)[0]
    assert f"Max address space {int(1.8 * taken)} " in " ".join(Path(f"/proc/{first.pid}/limits").read_text().split())
    assert small.judge(EASY[:1]) == SAID[:1]
    assert not alive(first.pid)
    small.close()


def test_workers_that_are_killed_are_started_again(pool):
    pool.judge(EASY)
    first = processes(pool)[0]
    os.kill(first.pid, signal.SIGKILL)
    assert pool.judge(EASY) == SAID
    assert not alive(first.pid) and processes(pool)[0].pid != first.pid


def test_a_text_that_ends_its_worker_twice_is_wrong(tmp_path):
    """By a worker of our own, as we know of no text that ends a real one."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os\ndef answer(request):\n    if 'bad' in request: os.abort()\n    return 'good' in request\n"
    )
    good, wrong, bad = (Request(("",), word, True) for word in ("good", "wrong", "bad"))
    pool = Pool(worker, workers=2, timeout=20.0)
    assert pool.judge([good, bad, good, wrong, bad]) == [True, Lost.DIED, True, False, Lost.DIED]
    pool.close()


def test_workers_that_do_not_start_are_an_error(tmp_path):
    (tmp_path / "worker.py").write_text("raise SystemExit(1)")
    with pytest.raises(RuntimeError, match=r"processes that judge do not start: try .*serve\.py .*worker\.py 0 60"):
        Pool(tmp_path / "worker.py", workers=2, timeout=5.0).judge(EASY)


def test_closing_ends_the_workers_and_they_can_start_again(pool):
    pool.judge(EASY)
    pid = processes(pool)[0].pid
    pool.close()
    assert not alive(pid)
    assert pool.judge(EASY) == SAID


def test_several_threads_may_ask(pool):
    found = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: pool.judge(EASY)})) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(found.values()) == [SAID] * 4


def test_a_request_larger_than_a_pipe(pool):
    long = [Request(("1/2", "x" * 300_000), "0.5", True)] * 8  # the second answer is not looked at
    assert pool.judge([*long, *EASY]) == [True] * 8 + SAID


@pytest.mark.parametrize("end", ["returns", "Ctrl-C", "is killed", "forks"])
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_no_worker_outlives_its_parent(end):
    code = f"""
        import os, sys
        from training.judges import Pool
        from training.tasks.maths.verdicts import WORKER, Request
        pool = Pool(WORKER, workers=1, timeout=3.0)
        pool.judge([Request(("1",), "1.0", True)])
        worker = pool._workers[0]._process.pid
        if {end!r} == "forks":
            child = os.fork()
            if not child:
                sys.exit()  # must not take its parent's worker with it
            os.waitpid(child, 0)
            assert pool.judge([Request(("1",), "1.0", True)]) and pool._workers[0]._process.pid == worker
        print(worker, flush=True)
        if {end!r} in ("Ctrl-C", "is killed"):
            pool.judge([Request(("1",), "(10^9)!", True)] * 2)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    worker = int(parent.stdout.readline())
    if end in ("Ctrl-C", "is killed"):
        time.sleep(0.5)  # in the midst of judging
        parent.send_signal(signal.SIGINT if end == "Ctrl-C" else signal.SIGKILL)
    _, errors = parent.communicate(timeout=60)
    assert ("KeyboardInterrupt" in errors) == (end == "Ctrl-C"), errors
    deadline = time.monotonic() + (15 if end == "is killed" else 0)  # after 3 s the system ends it
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(worker)


def check_hostile(task, count):
    """Each text gets 0 or 1 in bounded time, and afterwards the workers judge as before."""
    cases = list(hostile(count))
    begun = time.monotonic()
    scores = task.rewards["correctness"](
        [response for _, response in cases], [{"question": "", "answer": [right]} for right, _ in cases]
    )
    assert set(scores) <= {0.0, 1.0} and len(scores) == count
    assert all(task.rewards["format"]([text], [{}])[0] in (0.0, 1.0) for _, text in cases)
    assert time.monotonic() - begun < 30 + 0.1 * count
    assert task._judge.pool.judge(EASY) == SAID
    return cases, scores


def test_hostile_texts(lenient):
    cases, scores = check_hostile(lenient, 200)
    assert 0 < sum(scores) < 20
    assert any(len(text) > 10**5 for _, text in cases)


@pytest.mark.long
@pytest.mark.parametrize("boxed_only", [True, False])
def test_ten_thousand_hostile_texts(boxed_only):
    task = Maths(Maths.Settings("maths", boxed_only=boxed_only, timeout=2.0))
    check_hostile(task, 10_000)
    task.close()
