"""`python sample/sample.py ...` is `flowdopr sample ...`."""

import sys

from flowdopr.cli import main

main(["sample", *sys.argv[1:]])
