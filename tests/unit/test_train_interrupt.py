"""Signals during training: what is noted, and what is not ours to note."""

from __future__ import annotations

import signal

import pytest

from moetool.train.interrupt import noting


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("ignored", [False, True])
def test_a_signal_that_is_ignored_stays_so(signum: signal.Signals, ignored: bool) -> None:
    def own(*_: object) -> None:
        raise AssertionError("it acted")

    told: list[int] = []
    handler = signal.SIG_IGN if ignored else own
    before = signal.signal(signum, handler)
    try:
        with noting(lambda: told.append(1)) as noted:
            signal.raise_signal(signum)
        assert signal.getsignal(signum) is handler
    finally:
        signal.signal(signum, before)
    assert (noted.signum, len(told)) == ((0, 0) if ignored else (signum, 1))
