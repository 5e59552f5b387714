"""What the signals of a user and of a cluster do to a run."""

import signal

import pytest

from flowdopr.train import StopSignal

INT, TERM, USR2 = signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR2", None)


@pytest.mark.skipif(USR2 is None, reason="needs SIGUSR2")
@pytest.mark.parametrize(
    ("sent", "received"),
    [
        ([INT], INT),
        ([TERM], TERM),
        ([INT, INT], None),
        ([TERM, INT], None),
        ([TERM, USR2], USR2),  # a preemption, in whichever order they arrive
        ([USR2, TERM], USR2),
        ([USR2, USR2], USR2),
        ([USR2, INT], INT),  # the user stops a job that would be queued again
        ([INT, USR2], INT),
        ([USR2, INT, INT], None),
    ],
)
def test_the_first_signal_waits_for_the_step_and_a_second_urgent_one_does_not(sent, received):
    with StopSignal() as stop:
        for number in sent[:-1]:
            signal.raise_signal(number)
        if received is None:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(sent[-1])
        else:
            signal.raise_signal(sent[-1])
            assert stop.received == received
