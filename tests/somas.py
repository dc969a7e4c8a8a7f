"""Writing small SOMA experiments, with any ids for the cells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma
from anndata import AnnData


def write_soma(
    adata: AnnData, path: Path, *, ids=None, layers=("raw",), measurements=("RNA",), parent=None, columns=()
) -> Path:
    """Write the cells of `adata` in their order; obs gets `obs_id` and the columns named, var gets `var_id`."""
    ids = np.arange(adata.n_obs) if ids is None else np.asarray(ids)
    counts = adata.X.tocoo()
    values = {"soma_dim_0": ids[counts.row], "soma_dim_1": counts.col.astype(np.int64), "soma_data": counts.data}
    obs = adata.obs[list(columns)].assign(soma_joinid=ids, obs_id=adata.obs_names.to_numpy())
    var = pd.DataFrame({"soma_joinid": np.arange(adata.n_vars), "var_id": adata.var_names.to_numpy()})
    with (parent or tiledbsoma.Experiment).create(str(path)) as root:
        _write_table(root, "obs", obs)
        held = root.add_new_collection("ms")
        for name in measurements:
            measurement = held.add_new_collection(name, tiledbsoma.Measurement)
            _write_table(measurement, "var", var)
            matrices = measurement.add_new_collection("X")
            for layer in layers:
                shape = (int(ids.max()) + 1, adata.n_vars)
                matrices.add_new_sparse_ndarray(layer, type=pa.float32(), shape=shape).write(pa.table(values))
    return path


def write_census(path: Path, **organisms: AnnData) -> Path:
    """Write one experiment for each organism, laid out like the Census."""
    with tiledbsoma.Collection.create(str(path)) as root:
        root.add_new_collection("census_data")
    for name, adata in organisms.items():
        write_soma(adata, path / "census_data" / name)
        with (
            tiledbsoma.open(str(path / "census_data"), "w") as data,
            tiledbsoma.open(str(path / "census_data" / name)) as experiment,
        ):
            data.set(name, experiment, use_relative_uri=True)
    return path


def _write_table(parent, name: str, frame: pd.DataFrame) -> None:
    table = pa.Table.from_pandas(frame, preserve_index=False)
    domain = [[0, int(frame["soma_joinid"].max())]]
    uri = f"{parent.uri}/{name}"
    # closed before it joins its parent: categories written at the time of an open parent are lost
    with tiledbsoma.DataFrame.create(uri, schema=table.schema, domain=domain) as created:
        created.write(table)
    with tiledbsoma.open(uri) as created:
        parent.set(name, created, use_relative_uri=True)
