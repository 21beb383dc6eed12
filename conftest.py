"""What makes the tests quick."""

import gc
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # two threads that wait for each other stand still beside other workers; also of what tests start
    os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it when it is imported


def pytest_collection_finish() -> None:
    """Set aside what the imports have made: every training ends with ``gc.collect``, most of which would look through it again."""
    gc.collect()
    gc.freeze()
