"""flowdopr: flow-matching image generation that judges optimizers by their samples.

The rooms, in the order the data walks through them: `config`, `data`, `flow`, `models`, `optim`,
`train`, `evaluate`, `compare`. `docs/architecture.md` draws the way.
"""

from importlib.metadata import version

__version__ = version("flowdopr")
