"""`python breaking.py IMAGE train ...` is `flowdopr train ...` with an image that breaks later.

What is broken before the run begins would be found before training.
"""

import os
import sys

from flowdopr.cli import main
from flowdopr.train import start


def break_after_check(image: str) -> None:
    """Let the file `image` be truncated once the data were checked, before training."""
    checked = start.check_start

    def check_then_break(datasets):
        remarks = checked(datasets)
        os.truncate(image, 20)
        return remarks

    start.check_start = check_then_break


if __name__ == "__main__":
    break_after_check(sys.argv.pop(1))
    main()
