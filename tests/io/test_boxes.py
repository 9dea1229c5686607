from __future__ import annotations

import math
from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from patchreg.io import boxes
from patchreg.io.boxes import chunk_shape, parts, sizes, slab_box

shapes = st.tuples(*[st.integers(1, 20)] * 3)


@settings(deadline=None)
@given(shapes, shapes, st.integers(0, 2), st.integers(1, 500), st.data())
def test_parts_cover_a_slab_once_and_cut_no_chunk(shape, chunks, dim, voxels, data):
    start = data.draw(st.integers(0, shape[dim]))
    stop = data.draw(st.integers(start, shape[dim]))
    box = slab_box(shape, start, stop, dim)
    seen = np.zeros(shape, int)
    with mock.patch.object(boxes, "AT_ONCE", voxels):
        found = list(parts(box, chunks))
    for part in found:
        i, j, k = (slice(*r) for r in part)
        seen[i, j, k] += 1
        for r, whole, chunk in zip(part, box, chunks, strict=True):
            assert all(end % chunk == 0 or end in whole for end in r)
        assert part[0] == box[0]  # the fastest dimension is never cut
        least = sizes(box)[0] * chunks[1] * chunks[2]
        assert math.prod(sizes(part)) <= max(voxels, least)
    assert np.array_equal(seen == 1, np.isin(np.arange(shape[dim]), np.arange(start, stop)).reshape(
        [-1 if d == dim else 1 for d in range(3)]) & np.ones(shape, bool))  # fmt: skip


def test_chunks_end_where_slabs_do():
    whole = (500, 500, 500)
    assert chunk_shape(whole, 0, 0) == (64, 64, 64)
    assert chunk_shape(whole, 1, 128) == (64, 64, 64)
    assert chunk_shape(whole, 2, 32) == (88, 88, 32)
    assert chunk_shape(whole, 0, 1) == (1, 500, 500)  # anywhere: planes of their own
    assert chunk_shape(whole, 0, 97) == (97, 48, 48)
    assert chunk_shape((20, 30, 40), 0, 0) == (20, 30, 40)
    for multiple in range(1, 200):
        assert multiple % chunk_shape(whole, 0, multiple)[0] == 0
