"""A process that judges answers by math-verify: requests on its standard input, a reply each on its standard output.

Run as a script, so that it imports nothing but math-verify. A request is a line of JSON, `[gold, answer, boxed]` as in
`pool.Request`; a reply is a line of one letter.
"""

import contextlib
import json
import logging
import os
import signal
import sys

RIGHT, WRONG, READY, RETIRE = b"1\n", b"0\n", b"+\n", b"-\n"
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def main(memory: int, seconds: float) -> None:
    """Serve until the input ends.

    Args:
        memory: bytes of address space that this process may take; 0 for any number.
        seconds: after which the system ends this process in the midst of an answer, should nobody be left to do it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, whose end is the end of the input
    requests, replies = os.fdopen(os.dup(0), "rb"), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)  # what sympy prints must not be taken for replies
    os.dup2(null, 0)
    os.dup2(null, 1)
    folder = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if path != folder]  # its modules are not to be found by their bare names
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if memory:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    os.write(replies, READY)
    timer = getattr(signal, "setitimer", None)
    for line in requests:
        if timer:
            timer(signal.ITIMER_REAL, seconds)  # its signal has no handler: the system ends the process
        right = False
        with contextlib.suppress(Exception):  # RecursionError and MemoryError among them
            gold, answer, boxed = json.loads(line)
            found = parse(f"\\boxed{{{answer}}}" if boxed else answer, parsing_timeout=None)
            right = any(
                verify(parse(f"\\boxed{{{one}}}", parsing_timeout=None), found, timeout_seconds=None) for one in gold
            )
        if timer:
            timer(signal.ITIMER_REAL, 0)
        os.write(replies, RIGHT if right else WRONG)
        if memory and _taken() > memory // 2:  # a worker that is nearly full would call right answers wrong
            os.write(replies, RETIRE)
            return


def _taken() -> int:
    """Bytes of address space that this process has; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * _PAGE
    except OSError:
        return 0


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
