"""Numbers keep their significant digits and their units."""

import pytest

from flowdopr.compare.formats import count, listing, mean_sd, memory, number, percent, seconds
from flowdopr.compare.statistics import Spread


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0, "0.000"),
        (0.51234, "0.5123"),
        (12.345, "12.35"),
        (9.99996, "10.00"),
        (-3.0, "−3.000"),
        (12345.6, "12,346"),
        (1.5e-7, "1.500e−07"),
        (float("nan"), "nan"),
        (None, "–"),
    ],
)
def test_number(value, words):
    assert number(value) == words


def test_deviation_has_the_decimals_of_the_mean():
    assert mean_sd(Spread(12.345, 0.5, 3)) == "12.35 ± 0.50"
    assert mean_sd(Spread(0.51234, 0.01, 3)) == "0.5123 ± 0.0100"
    assert mean_sd(Spread(12.345, None, 1)) == "12.35"
    assert mean_sd(None) == "–"


def test_units():
    assert percent(Spread(0.975, 0.01, 2)) == "97.5 ± 1.0 %"
    assert (seconds(0.0123), seconds(2.5)) == ("12.3 ms", "2.5 s")
    assert (memory(512 * 2**20), memory(3 * 2**30)) == ("512 MiB", "3.0 GiB")
    assert (count(1, "seed"), count(2, "seed")) == ("1 seed", "2 seeds")
    assert listing(["a", "b", "c"]) == "a, b and c"
