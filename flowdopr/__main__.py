"""`python -m flowdopr` is the command `flowdopr`."""

from flowdopr.cli import main

main()
