from __future__ import annotations

import os
import signal
import threading

import pytest

from raypipe.driver.interrupts import hold_interrupts


def test_an_interrupt_comes_after_the_block() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), hold_interrupts():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        done.append(True)
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_an_interrupt_nothing_changes() -> None:
    before = signal.getsignal(signal.SIGINT)
    with hold_interrupts():
        pass
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_may_use_it() -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with hold_interrupts():
                pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures
