"""`python scripts/train.py ...` is `flowdopr train ...`."""

import sys

from flowdopr.cli import main

main(["train", *sys.argv[1:]])
