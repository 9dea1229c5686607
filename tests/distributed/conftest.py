"""The ranks that the tests of this folder share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the processes find rank_pool and comparison there, too

import pytest
from rank_pool import RankPool


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Four processes, connected by Gloo."""
    pool = RankPool()
    yield pool
    pool.stop()
