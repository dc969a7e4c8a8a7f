"""Cells from the CZ CELLxGENE Census, or from another TileDB-SOMA that is laid out like it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from scllm._checks import missing_key
from scllm._log import log, progress
from scllm._names import listed
from scllm._results import record
from scllm._typing import IntArray
from scllm._words import size_in_words, time_in_words
from scllm.data.soma import ID, is_address
from scllm.datasets._download import Download, check_target, in_parts
from scllm.datasets._filter import checked_filter, closest, compared_texts
from scllm.datasets._samples import draw_samples, samples_of
from scllm.datasets._soma import Experiment, open_experiment

__all__ = ["census"]

_FILTER = "suspension_type != 'na' and disease == 'normal' and tissue_general == 'blood' and is_primary_data == True"
_DATASET, _N_VALUES = "dataset_id", "nnz"
# bytes of a stored value: float32, and the int32 of its gene
_BYTES = 8
# cells that are read first, to estimate the time
_PROBE = 512


def census(
    *,
    organism: str = "homo_sapiens",
    obs_filter: str | None = _FILTER,
    n_cells: int | None = 300_000,
    by: str = "donor_id",
    uri: str | PathLike[str] | None = None,
    census_version: str = "stable",
    out: str | PathLike[str] | None = None,
    random_state: int = 0,
) -> AnnData | Path:
    """Draw whole samples of cells with raw counts from the CZ CELLxGENE Census.

    A sample is all cells of a donor within a data set that pass the filter. Samples are drawn at random up to at most
    ``n_cells``; a sample that no longer fits is skipped. Whole samples keep their mix of cell types, and whole donors
    can later be held out.

    A cell can be in several data sets of the Census. Only its primary copy is read, unless ``obs_filter`` names
    ``is_primary_data`` itself.

    Parameters
    ----------
    organism
        ``"homo_sapiens"``, ``"mus_musculus"``, or another organism of the SOMA.
    obs_filter
        Comparisons of columns of ``obs`` with values, joined by ``and`` and ``or``. By default, cells of normal blood
        that were suspended. ``None``: all cells.
    n_cells
        Largest number of cells. ``None``: all that pass the filter.
    by
        Column of ``obs`` by which the cells of a data set are divided into samples.
    uri
        Folder or address of a TileDB-SOMA to read instead of the public Census, which needs a connection.
    census_version
        Release of the public Census: a date such as ``"2025-01-30"``, ``"stable"`` or ``"latest"``. Pass a date to get
        the same cells later.
    out
        File to write the cells to, in parts, without holding them in memory: ``.h5ad``, or ``.zarr`` (version 3, in
        shards). If the call is interrupted, the same call resumes it. ``None``: the cells are returned.
    random_state
        Seed of the draw. The same call gives the same cells.

    Returns
    -------
    The cells in the order of their ids, or with ``out`` the path of the file. ``X`` holds raw counts (CSR, float32),
    ``obs`` and ``var`` have all columns of the SOMA. ``var_names`` are Ensembl ids.

    Writes
    ------
    ``adata.uns["scllm"]["census"]``
        ``params`` with the release as ``census_version`` and the filter as it was used; ``table`` with the data set,
        the donor and the number of cells of each sample.

    Examples
    --------
    >>> cells = scllm.datasets.census(out="blood.zarr")  # doctest: +SKIP
    >>> model = scllm.tl.pretrain(cells)  # doctest: +SKIP

    Without a connection, from a copy of a part of the Census:

    >>> b_cells = scllm.datasets.census(uri="mini_census", obs_filter="cell_type == 'B cell'")  # doctest: +SKIP
    >>> b_cells.shape  # doctest: +SKIP
    (153, 13958)
    """
    _check_numbers(n_cells, random_state)
    path = None if out is None else check_target(out)
    address = None if uri is None else _absolute(fspath(uri))
    with open_experiment(address, census_version, organism) as experiment:
        condition = checked_filter(obs_filter, experiment.obs_columns)
        drawn = _draw(experiment, condition, obs_filter, by, n_cells, random_state)
        params = {
            "organism": organism,
            "obs_filter": condition,
            "n_cells": None if n_cells is None else int(n_cells),
            "by": by,
            "uri": address,
            "census_version": experiment.version or census_version,
            "random_state": int(random_state),
        }
        params["digest"] = _digest(params, drawn.ids)
        download = None if path is None else Download(path, params)
        if download is not None and download.is_finished():
            log.info("keeping '%s', which holds these cells", path)
            return download.path
        _log_estimate(experiment, drawn)
        adata = AnnData(obs=experiment.obs(drawn.ids), var=experiment.var)
        record(adata, "census", params, drawn.samples)
        parts = in_parts(drawn.ids)
        if download is None:
            read = progress(map(experiment.counts, parts), desc="downloading", total=len(parts), unit="part")
            adata.X = sparse.vstack(list(read), format="csr")
            return adata
        download.fetch(parts, experiment.counts)
    download.join(adata, len(parts))
    return download.path


@dataclass(frozen=True)
class _Drawn:
    """Ids of the drawn cells, in increasing order, their samples, and the number of counts, if it is known."""

    ids: IntArray
    samples: pd.DataFrame
    n_values: int | None


def _check_numbers(n_cells: Any, random_state: Any) -> None:
    if n_cells is not None and not (isinstance(n_cells, Integral) and n_cells > 0):
        raise ValueError(f"Expected n_cells to be a whole number of at least 1, got {n_cells!r}. Pass None for all.")
    if not (isinstance(random_state, Integral) and random_state >= 0):
        raise ValueError(f"Expected random_state to be a whole number of at least 0, got {random_state!r}. Pass one.")


def _digest(params: Mapping[str, Any], ids: IntArray) -> str:
    """Hash which cells of which release these are."""
    digest = hashlib.blake2b(f"{params['organism']} {params['census_version']}".encode(), digest_size=8)
    digest.update(ids.tobytes())
    return digest.hexdigest()


def _absolute(uri: str) -> str:
    """Make a path absolute, because TileDB keeps to the working directory in which it was first used."""
    return uri if is_address(uri) else str(Path(uri).absolute())


def _draw(
    experiment: Experiment, condition: str | None, obs_filter: str | None, by: str, n_cells: int | None, seed: int
) -> _Drawn:
    """Draw whole samples from the cells that pass the filter."""
    columns = experiment.obs_columns
    if by not in columns:
        raise missing_key(by, columns, "a column of obs", "Correct by=.")
    keys = list(dict.fromkeys([name for name in (_DATASET,) if name in columns] + [by]))
    sizes = [name for name in (_N_VALUES,) if name in columns and name not in keys]
    cells = experiment.ids(condition, [*keys, *sizes])
    if not len(cells):
        raise _no_cells(experiment, obs_filter, condition)
    samples, of_cell = samples_of(cells, keys)
    is_drawn = draw_samples(samples["n_cells"].to_numpy(), n_cells, seed)
    if not is_drawn.any():
        smallest = samples.loc[samples["n_cells"].idxmin()]
        name = ", ".join(f"{key} {smallest[key]!r}" for key in keys)
        raise ValueError(
            f"Expected n_cells of at least {smallest['n_cells']}, the size of the smallest sample ({name}), got "
            f"{n_cells}. Pass a larger n_cells, because samples are taken whole."
        )
    chosen = cells[is_drawn[of_cell]]
    n_values = int(chosen[_N_VALUES].sum()) if sizes else None
    return _Drawn(chosen[ID].to_numpy(np.int64), samples[is_drawn].reset_index(drop=True), n_values)


def _no_cells(experiment: Experiment, obs_filter: str | None, condition: str | None) -> ValueError:
    """Make the error for a filter that no cell passes, which names the first value that does not occur."""
    advice = "Loosen the filter."
    for column, text in () if obs_filter is None else compared_texts(obs_filter):
        known = experiment.texts(column)
        if known and text not in known:
            offer = closest(text, known) or f"There is {listed(known)}."
            advice = f"obs[{column!r}] has no value {text!r}. {offer}"
            break
    return ValueError(f"Expected at least one cell that passes the filter {condition!r}, got none. {advice}")


def _log_estimate(experiment: Experiment, drawn: _Drawn) -> None:
    """Log what is going to be read and, from the time of the first cells, how long it takes."""
    n, probe = len(drawn.ids), drawn.ids[:_PROBE]
    began = time.perf_counter()
    first = experiment.counts(probe)
    seconds = (time.perf_counter() - began) * n / len(probe)
    n_values = first.nnz * n / len(probe) if drawn.n_values is None else drawn.n_values
    log.info(
        "downloading %s cells of %d %s, %s in memory, %s",
        f"{n:,}",
        len(drawn.samples),
        "sample" if len(drawn.samples) == 1 else "samples",
        size_in_words(_BYTES * n_values),
        time_in_words(seconds),
    )
