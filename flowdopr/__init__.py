"""flowdopr: flow-matching image generation that judges optimizers by their samples.

The rooms, in the order the data walks through them: `config`, `data`, `flow`, `models`, `optim`,
`train`, `evaluate`, `compare`. `docs/architecture.md` draws the way.
"""


def __getattr__(name: str) -> str:
    """`__version__`, looked up when it is asked for: Ctrl-C finds the command ready sooner."""
    if name != "__version__":
        raise AttributeError(f"module 'flowdopr' has no attribute '{name}'")
    from importlib.metadata import version

    return version("flowdopr")
