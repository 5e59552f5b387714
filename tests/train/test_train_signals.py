"""What the signals of a user and of a cluster do to a run."""

import signal

import pytest

from flowdopr.train import StopSignal

INT, TERM = signal.SIGINT, signal.SIGTERM
USR = "SIGUSR1 or SIGUSR2"


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs SIGUSR1")
@pytest.mark.parametrize("usr", ["SIGUSR1", "SIGUSR2"])
@pytest.mark.parametrize(
    ("sent", "received"),
    [
        ([INT], INT),
        ([TERM], TERM),
        ([INT, INT], None),
        ([TERM, INT], None),
        ([TERM, USR], USR),  # a preemption, in whichever order they arrive
        ([USR, TERM], USR),
        ([USR, USR], USR),
        ([USR, INT], INT),  # the user stops a job that would be queued again
        ([INT, USR], INT),
        ([USR, INT, INT], None),
    ],
)
def test_the_first_signal_waits_for_the_step_and_a_second_urgent_one_does_not(sent, received, usr):
    sent = [getattr(signal, usr) if one == USR else one for one in sent]
    received = getattr(signal, usr) if received == USR else received
    with StopSignal() as stop:
        for number in sent[:-1]:
            signal.raise_signal(number)
        if received is None:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(sent[-1])
        else:
            signal.raise_signal(sent[-1])
            assert stop.received == received
