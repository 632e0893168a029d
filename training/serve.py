"""A process that judges: `serve.py SCRIPT MEMORY SECONDS` answers requests by what SCRIPT defines as `answer`.

Run as a script, so that it imports nothing but what SCRIPT does. A request is a line of JSON on its standard input; the
reply, a line of JSON on its standard output, is `answer(request)`, or null where that raised. A line `+` says that it
has started, a line `-` that it ends by itself.
"""

import contextlib
import importlib.util
import json
import logging
import os
import signal
import sys

READY, RETIRE = b"+\n", b"-\n"
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def main(script: str, memory: int, seconds: float) -> None:
    """Serve until the input ends.

    Args:
        memory: bytes of address space that this process may take; 0 for any number.
        seconds: of a processor that an answer may take; then the system ends this process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, whose end is the end of the input
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    null = os.open(os.devnull, os.O_RDWR)  # what is printed must not be taken for replies
    os.dup2(null, 0)
    os.dup2(null, 1)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if memory:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    answer = _load(script)
    logging.disable(logging.CRITICAL)
    replies.write(READY)
    timer = getattr(signal, "setitimer", None)
    for line in requests:
        if timer:
            timer(signal.ITIMER_PROF, seconds)  # its signal has no handler: the system ends the process
        reply = None
        with contextlib.suppress(Exception):  # RecursionError and MemoryError among them
            reply = answer(json.loads(line))
        if timer:
            timer(signal.ITIMER_PROF, 0)
        data = memoryview(json.dumps(reply).encode("ascii") + b"\n")
        while data:
            data = data[replies.write(data) :]
        if memory and _taken() > memory // 2:  # one that is nearly full would call right answers wrong
            replies.write(RETIRE)
            return


def _load(script: str):
    """What a file defines as `answer`; the folder of this one is no place to import from."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != here]
    spec = importlib.util.spec_from_file_location("served", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.answer


def _taken() -> int:
    """Bytes of address space that this process has; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * _PAGE
    except OSError:
        return 0


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
