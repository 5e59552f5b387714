"""`python scripts/compare.py ...` is `flowdopr compare ...`."""

import sys

from flowdopr.cli import main

main(["compare", *sys.argv[1:]])
