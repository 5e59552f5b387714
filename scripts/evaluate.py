"""`python scripts/evaluate.py ...` is `flowdopr evaluate ...`."""

import sys

from flowdopr.cli import main

main(["evaluate", *sys.argv[1:]])
