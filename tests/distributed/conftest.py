"""The ranks that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ranks.rank_pool import RankPool


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Four processes, connected by Gloo."""
    pool = RankPool()
    yield pool
    pool.stop()
