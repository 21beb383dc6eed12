"""One thread for each worker of pytest-xdist and for what its tests start: two that wait for each other on a busy machine stand still."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it when it is imported
