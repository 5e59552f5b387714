"""Damaged files for property tests of readers, which must read them or refuse them in one line."""

import warnings

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FEW = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # each example writes all anew
)


@st.composite
def damage(draw):
    """A function of bytes: overwrites some, inserts some, cuts the end off, or replaces all."""
    place, size = draw(st.floats(0, 1)), draw(st.integers(1, 8))
    new = draw(st.binary(min_size=size, max_size=size))
    kind = draw(st.sampled_from(["overwrite", "overwrite", "overwrite", "insert", "cut", "all"]))

    def apply(content: bytes) -> bytes:
        at = int(place * len(content))
        return {
            "overwrite": content[:at] + new + content[at + size :],
            "insert": content[:at] + new + content[at:],
            "cut": content[:at],
            "all": new,
        }[kind]

    return apply


def read_or_refused(read) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what it repairs
        try:
            read()
        except ValueError as error:
            message = str(error)
        else:
            message = "read"
    assert message
    assert message.isprintable()  # so it is one line
