"""Spots of tissue sections: which section each belongs to, how far apart they are, and which are neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.spatial import cKDTree

from scllm import _keys
from scllm._checks import missing_key, obs_column
from scllm._names import listed
from scllm._typing import CSR, FloatArray, IntArray

__all__ = [
    "each_section",
    "nearest_spots",
    "sections_of",
    "spatial_blocks",
    "spot_graph",
    "spot_pitch",
    "spot_positions",
]

# reaches the 6 neighbours of a hexagonal array and the 8 of a square one, in units of the distance between spots
_REACH = 1.5
_TIED = 12  # further spots that may be as far away as the last one


def spot_positions(obsm: Mapping[str, Any], names: pd.Index) -> FloatArray:
    """Return ``obsm["spatial"]`` as x and y of each spot, ``(n, 2)`` float64; raise if it is missing or not finite."""
    if _keys.SPATIAL not in obsm:
        advice = "Store x and y of each spot there, in pixels of the full-size image."
        raise missing_key(_keys.SPATIAL, obsm, "in adata.obsm", advice)
    xy = np.asarray(obsm[_keys.SPATIAL], dtype=np.float64)
    if xy.ndim != 2 or xy.shape[1] < 2:
        raise ValueError(
            f"Expected obsm['spatial'] to hold x and y of each spot, shape ({len(names)}, 2), got {xy.shape}. "
            "Store two columns."
        )
    bad = np.flatnonzero(~np.isfinite(xy[:, :2]).all(axis=1))
    if len(bad):
        raise ValueError(
            f"Expected finite positions in obsm['spatial'], but {len(bad)} of {len(xy)} spots have others (first: "
            f"{names[bad[0]]!r}). Remove those spots."
        )
    return xy[:, :2]


def sections_of(obs: pd.DataFrame, libraries: Iterable[str], library_key: str | None = None) -> pd.Series:
    """Return the section of each spot, as strings.

    Parameters
    ----------
    obs
        Table of spots.
    libraries
        Keys of ``uns["spatial"]``.
    library_key
        Column that names the section. ``None``: with at most one library all spots are one section, with several it is
        the column whose values are the names of libraries.
    """
    libraries = list(map(str, libraries))
    if library_key is None:
        if len(libraries) < 2:
            return pd.Series((libraries or ["section"])[0], index=obs.index, dtype=object)
        fitting = [
            str(column)
            for column in obs
            if not pd.api.types.is_float_dtype(obs[column]) and set(obs[column].dropna().astype(str)) <= set(libraries)
        ]
        if not fitting:
            raise ValueError(
                f"Expected a column of obs that names the section of each spot, because uns['spatial'] holds "
                f"{len(libraries)} ({listed(libraries)}), but no column has these values. Pass library_key=."
            )
        library_key = fitting[0]
    column = obs_column(obs, library_key)
    n_lacking = int(column.isna().sum())
    if n_lacking:
        raise ValueError(
            f"Expected a section for every spot in obs[{library_key!r}], but {n_lacking} of {len(column)} have none. "
            "Fill them in, or remove those spots."
        )
    return column.astype(str).astype(object)


def each_section(section: pd.Series) -> Iterator[tuple[str, IntArray]]:
    """Yield the name and the rows of each section, in the order of their first spots."""
    codes, names = pd.factorize(section.to_numpy())
    for code, name in enumerate(names):
        yield str(name), np.flatnonzero(codes == code)


def spot_pitch(xy: FloatArray) -> float:
    """Return the distance between neighbouring spots of a section: the median distance to the nearest one."""
    if len(xy) < 2:
        return float("nan")
    return float(np.median(cKDTree(xy).query(xy, k=2)[0][:, 1]))


def spot_graph(xy: FloatArray, section: pd.Series) -> CSR:
    """Connect spots up to 1.5 times the distance between neighbouring spots apart, never across sections.

    These are the 6 neighbours of a spot in a hexagonal array and the 8 in a square one.
    """
    rows, columns = [], []
    for _, spots in each_section(section):
        pitch = spot_pitch(xy[spots])
        if not pitch > 0:
            continue
        pairs = cKDTree(xy[spots]).query_pairs(_REACH * pitch, output_type="ndarray")
        rows += [spots[pairs[:, 0]], spots[pairs[:, 1]]]
        columns += [spots[pairs[:, 1]], spots[pairs[:, 0]]]
    n = len(xy)
    if not rows:
        return sparse.csr_matrix((n, n), dtype=np.float32)
    at = np.concatenate(rows), np.concatenate(columns)
    return sparse.csr_matrix((np.ones(len(at[0]), np.float32), at), shape=(n, n))


def nearest_spots(xy: FloatArray, section: pd.Series, k: int) -> IntArray:
    """Return the ``k`` nearest other spots of the same section, ``(n, k)``.

    Of spots at the same distance, those further up and then further left come first, so that the result does not depend
    on the order of spots. In a section with fewer spots, the nearest ones are repeated; a spot that is alone is its own
    neighbour.
    """
    found = np.empty((len(xy), k), np.int64)
    for _, spots in each_section(section):
        n = min(k, len(spots) - 1)
        if not n:
            found[spots] = spots[:, None]
            continue
        at = xy[spots]
        far, near = cKDTree(at).query(at, k=min(n + 1 + _TIED, len(spots)))
        steps = np.rint(far / max(spot_pitch(at), 1e-12) * 1e4)
        order = np.lexsort((at[near, 0], at[near, 1], steps), axis=1)
        near = np.take_along_axis(near, order, axis=1)
        # a spot at the same place may come before the spot itself, so drop by number and not by column
        own = near == np.arange(len(spots))[:, None]
        own[~own.any(axis=1), -1] = True
        others = near[~own].reshape(len(spots), -1)
        found[spots] = spots[others[:, np.arange(k) % n]]
    return found


def spatial_blocks(xy: FloatArray, n_blocks: int) -> IntArray:
    """Divide the spots of a section into contiguous blocks of nearly equal size, ``(n,)``: block of each spot.

    The block with most spots is halved at the median of its longer axis until there are enough.
    """
    block = np.zeros(len(xy), np.int64)
    for new in range(1, min(n_blocks, len(xy))):
        spots = np.flatnonzero(block == np.bincount(block).argmax())
        axis = int(np.ptp(xy[spots], axis=0).argmax())
        upper = np.argsort(xy[spots, axis], kind="stable")[len(spots) // 2 :]
        block[spots[upper]] = new
    return block
