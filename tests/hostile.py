"""Run moetool on hostile input in a child of this process, and hold what it does against what may happen.

A child is forked, so libraries are imported once, and a crash, a hang or a lack of memory ends the
child alone. `outcome` is one attempt; `hold` says what must be true of each.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ALLOWED = {0, 1, 2, 3}  # and never 70, a signal or a time-out
SECONDS = 60
MEGABYTES = 600  # that an attempt may take beyond what this process has; the inputs are small


@dataclass(frozen=True)
class Outcome:
    """What an attempt did.

    Attributes:
        code: exit code; negative: the signal that ended it.
        out: standard output.
        err: standard error.
        megabytes: peak memory beyond what the process had before.
        seconds: how long it took.
    """

    code: int
    out: str
    err: str
    megabytes: float
    seconds: float


def in_child(work: Callable[[], int], megabytes: int = MEGABYTES, seconds: int = SECONDS) -> Outcome:
    """Call `work` in a forked child with so much memory and time; its result is the exit code."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        began = time.monotonic()
        child = os.fork()
        if child == 0:  # nothing of pytest may run here, whatever happens
            code = 99
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.stdout, sys.stderr = (os.fdopen(n, "w", errors="backslashreplace") for n in (1, 2))
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(seconds)
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                limit = pages * resource.getpagesize() + megabytes * 2**20
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                code = work()
            except SystemExit as leaving:
                code = leaving.code if isinstance(leaving.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(BaseException):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        _, status, usage = os.wait4(child, 0)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        out.seek(0)
        err.seek(0)
        printed, told = (file.read().decode("utf-8", "replace") for file in (out, err))
        grown = max(0, usage.ru_maxrss - before) / 1024
        return Outcome(os.waitstatus_to_exitcode(status), printed, told, grown, time.monotonic() - began)


def moetool(*arguments: object, megabytes: int = MEGABYTES, seconds: int = SECONDS) -> Outcome:
    """Run a command line in a child."""
    from moetool.cli import run

    return in_child(lambda: run([str(a) for a in arguments]), megabytes, seconds)


def hold(outcome: Outcome) -> Outcome:
    """Fail unless it ended as it may: a documented exit code, one line, nothing that acts on a terminal."""
    told = f"exit {outcome.code} after {outcome.seconds:.1f} s: {outcome.err[-3000:]}"
    assert outcome.code in ALLOWED, told
    assert "Traceback" not in outcome.err, told
    assert "out of memory" not in outcome.err, told
    if outcome.code:
        complaints = [line for line in outcome.err.splitlines() if line.startswith("moetool: ")]
        assert len(complaints) == 1, told
        assert outcome.err.rstrip("\n").splitlines()[-1] == complaints[0], told
    acting = {c for c in outcome.out + outcome.err if is_control(c)}
    assert not acting, f"control characters {acting!r}: {told}"
    return outcome


def is_control(character: str) -> bool:
    """Whether a character can act on a terminal or turn the direction of text; line breaks may."""
    return character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
