"""A folder of data sets for the whole test run, and small helpers."""

import logging
import os
import tempfile
from collections.abc import Iterator

import pytest

collect_ignore = ["crash_test.py", "many_ranks.py"]  # programs of their own
# Read when gn_practical is imported, as Detectron2's own data sets are.
os.environ["DETECTRON2_DATASETS"] = tempfile.mkdtemp(prefix="gn_practical_datasets_")
# Ranks, workers and the test process share the cores: waiting in a long loop would stall them.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")


@pytest.fixture(autouse=True)
def no_handler_of_an_earlier_test() -> Iterator[None]:
    """Handlers that a tool run here has set up write to a stream that is closed after the test."""
    loggers = [logging.getLogger(name) for name in ("", "detectron2", "fvcore", "gn_practical")]
    before = [list(logger.handlers) for logger in loggers]
    yield
    for logger, known in zip(loggers, before, strict=True):
        for handler in list(logger.handlers):
            if type(handler) is logging.StreamHandler and handler not in known:
                logger.removeHandler(handler)


@pytest.fixture
def catalogs_as_before() -> Iterator[None]:
    """Names registered by a test are gone after it."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from gn_practical.training.data import registration

    names, known = set(DatasetCatalog), dict(registration._registered)
    yield
    for name in set(DatasetCatalog) - names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    registration._registered.clear()
    registration._registered.update(known)
