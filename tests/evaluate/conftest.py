"""A run that was never trained, and one classifier cache for the whole session."""

import pytest
from untrained import make_config, save_random_checkpoint

from flowdopr.data import Datasets
from flowdopr.latents import build_datasets
from flowdopr.runs import RunFolder, begin_run


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWDOPR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Datasets:
    return build_datasets(make_config(tmp_path_factory.mktemp("unused")))


@pytest.fixture
def make_run(tmp_path, digits):
    """`make_run()` -> a run folder with random weights at steps 1 and 2."""

    def make(**settings) -> RunFolder:
        run = begin_run(make_config(tmp_path, **settings), digits.info, {}, resume=False)
        for step in (1, 2):
            save_random_checkpoint(run, step)
        return run

    return make
