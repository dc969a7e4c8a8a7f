"""Spots: sections, neighbours, blocks."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from messages import naming

from scllm.data.spots import nearest_spots, sections_of, spatial_blocks, spot_graph, spot_pitch, spot_positions


def hexagonal(side: int, pitch: float = 100.0) -> np.ndarray:
    rows, columns = np.divmod(np.arange(side**2), side)
    return np.stack([(columns + rows % 2 / 2) * pitch, rows * pitch * np.sqrt(3) / 2], axis=1)


@pytest.mark.parametrize(("xy", "n_inside"), [(hexagonal(7), 6), (np.argwhere(np.ones((7, 7))) * 50.0, 8)])
def test_spots_inside_an_array_have_all_their_neighbours(xy, n_inside):
    graph = spot_graph(xy, pd.Series(["a"] * len(xy)))
    assert graph.getnnz(axis=1).max() == n_inside
    assert graph[24].nnz == n_inside
    assert (graph != graph.T).nnz == 0
    assert graph.diagonal().sum() == 0


def test_sections_are_never_joined():
    xy = np.vstack([hexagonal(4), hexagonal(4)])
    section = pd.Series(["a"] * 16 + ["b"] * 16)
    graph = spot_graph(xy, section)
    assert graph[:16, 16:].nnz == 0
    near = nearest_spots(xy, section, 5)
    assert (near[:16] < 16).all()
    assert (near[16:] >= 16).all()


def test_nearest_spots_are_those_of_a_slower_search():
    xy = np.random.default_rng(0).normal(size=(30, 2))
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    expected = np.argsort(distance, axis=1)[:, :4]
    assert (nearest_spots(xy, pd.Series(["a"] * 30), 4) == expected).all()


def test_small_sections_repeat_their_spots():
    near = nearest_spots(np.array([[0.0, 0], [1, 0], [9, 9]]), pd.Series(["a", "a", "b"]), 3)
    assert near.tolist() == [[1, 1, 1], [0, 0, 0], [2, 2, 2]]


def test_a_spot_at_the_place_of_another_is_its_neighbour():
    near = nearest_spots(np.array([[0.0, 0], [0, 0], [0, 0], [5, 5]]), pd.Series(["a"] * 4), 2)
    assert all(spot not in near[spot] for spot in range(4))


def test_blocks_are_contiguous_and_even():
    xy = hexagonal(12)
    block = spatial_blocks(xy, 8)
    assert np.bincount(block).tolist() == [18] * 8
    graph = spot_graph(xy, pd.Series(block.astype(str)))
    from scipy.sparse.csgraph import connected_components

    assert connected_components(graph)[0] == 8


def test_pitch_is_the_distance_of_neighbours():
    assert spot_pitch(hexagonal(5, pitch=137.0)) == pytest.approx(137.0)


def test_the_column_of_sections_is_found_by_its_values():
    obs = pd.DataFrame({"type": ["x", "y"], "slide": ["s2", "s1"]})
    assert sections_of(obs, ["s1", "s2"]).tolist() == ["s2", "s1"]
    assert sections_of(obs, ["s1"]).tolist() == ["s1", "s1"]
    with pytest.raises(ValueError, match=naming("library_key=", "'s1'", "'s3'", 2)):
        sections_of(obs, ["s1", "s3"])


def test_positions_must_be_there_and_finite():
    names = pd.Index(["p", "q"])
    with pytest.raises(KeyError, match=naming("spatial")):
        spot_positions({}, names)
    with pytest.raises(ValueError, match=naming("'q'", 1, 2)):
        spot_positions({"spatial": np.array([[0, 0], [np.nan, 1]])}, names)
