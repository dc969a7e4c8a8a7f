"""Cells of the Census are those in the SOMA: whole samples, the same each time, also after a kill."""

from __future__ import annotations

import doctest
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from messages import naming
from scipy import sparse

import scllm
from scllm import datasets, tl
from scllm.data import soma
from scllm.data.source import open_source
from scllm.datasets import _download, _soma

tiledbsoma = pytest.importorskip("tiledbsoma", reason="needs the extra 'census'")
import pyarrow as pa  # noqa: E402

HUMAN = "census_data/homo_sapiens"
B_CELLS = "cell_type == 'B cell'"


@pytest.fixture(scope="session")
def mini(shared, tmp_path_factory) -> Path:
    """800 real cells, laid out like the Census."""
    folder = tmp_path_factory.mktemp("soma")
    with tarfile.open(shared / "data" / "mini_census.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "mini_census"


@pytest.fixture(scope="session")
def divided(mini, tmp_path_factory) -> Path:
    """The same cells, the first half of them in a second data set, and every fourth one a duplicate."""
    copy = tmp_path_factory.mktemp("divided") / "census"
    shutil.copytree(mini, copy)
    uri = str(copy / HUMAN / "obs")
    with tiledbsoma.open(uri) as stored:
        obs = stored.read().concat().to_pandas()
    obs["dataset_id"] = pd.Categorical(np.where(obs["soma_joinid"] < 400, "second", obs["dataset_id"].astype(str)))
    obs.loc[::4, "is_primary_data"] = False
    with tiledbsoma.open(uri, "w") as stored:
        stored.write(pa.Table.from_pandas(obs, preserve_index=False))
    return copy


@pytest.fixture
def small_parts(monkeypatch) -> None:
    monkeypatch.setattr(_download, "PART", 100)


def all_obs(uri: Path) -> pd.DataFrame:
    with tiledbsoma.open(str(uri / HUMAN / "obs")) as stored:
        return stored.read().concat().to_pandas()


def assert_same(found: AnnData, expected: AnnData) -> None:
    assert (found.X != expected.X).nnz == 0
    assert np.array_equal(found.X.indptr, expected.X.indptr)
    pd.testing.assert_frame_equal(found.obs, expected.obs)
    pd.testing.assert_frame_equal(found.var, expected.var)
    of_found, of_expected = (one.uns["scllm"]["census"] for one in (found, expected))
    assert of_found["params"] == of_expected["params"]
    assert of_found["table"].astype(str).equals(of_expected["table"].astype(str))


def test_a_filter_gives_exactly_its_cells_and_their_counts(mini) -> None:
    found = datasets.census(uri=mini, obs_filter=B_CELLS)
    obs = all_obs(mini)
    expected = obs[obs["cell_type"] == "B cell"]
    assert found.obs["soma_joinid"].tolist() == expected["soma_joinid"].tolist()
    assert len(expected) == 153
    # one value after the other, from the whole matrix
    with tiledbsoma.open(str(mini / HUMAN / "ms" / "RNA" / "X" / "raw")) as stored:
        cells, genes, counts = (column.to_pylist() for column in stored.read().tables().concat())
    wanted = set(expected["soma_joinid"])
    in_soma = {(c, g): v for c, g, v in zip(cells, genes, counts, strict=True) if c in wanted}
    matrix = found.X.tocoo()
    ids, gene_ids = found.obs["soma_joinid"].to_numpy(), found.var["soma_joinid"].to_numpy()
    assert dict(zip(zip(ids[matrix.row], gene_ids[matrix.col], strict=True), matrix.data, strict=True)) == in_soma
    assert len(in_soma) == found.X.nnz == int(expected["nnz"].sum())


def test_counts_are_those_of_the_file_that_the_soma_was_made_of(mini, shared) -> None:
    found = datasets.census(uri=mini, obs_filter=None, n_cells=None)
    source = ad.read_h5ad(shared / "data" / "pbmc_zheng2017_facs.h5ad")
    source.var_names = source.var["ensembl_id"]
    expected = source[found.obs_names, found.var_names]
    assert found.shape == (800, 13_958)
    assert (found.X != expected.X).nnz == 0


def test_the_example_runs(mini, monkeypatch) -> None:
    monkeypatch.chdir(mini.parent)
    example = datasets.census.__doc__.split("Without a connection")[1].replace("# doctest: +SKIP", "")
    test = doctest.DocTestParser().get_doctest(example, {"scllm": scllm}, "census", None, None)
    assert doctest.DocTestRunner().run(test) == doctest.TestResults(failed=0, attempted=2)


def test_cells_are_laid_out_as_promised(mini, tmp_path) -> None:
    adata = datasets.census(uri=mini, obs_filter=B_CELLS)
    assert isinstance(adata.X, sparse.csr_matrix)
    assert adata.X.dtype == np.float32
    assert adata.X.has_sorted_indices
    assert adata.X.data.min() == 1
    assert adata.var_names.tolist() == adata.var["feature_id"].tolist()
    assert adata.var_names[0] == "ENSG00000237683"
    assert adata.obs["cell_type"].cat.categories.tolist() == ["B cell"]
    assert set(adata.obs) == {*all_obs(mini).columns}
    entry = adata.uns["scllm"]["census"]
    assert entry["params"]["census_version"] == "2026-01-01"
    assert entry["params"]["obs_filter"] == f"({B_CELLS}) and is_primary_data == True"
    assert entry["params"]["uri"] == str(mini)
    assert entry["table"].astype(str).to_numpy().tolist() == [["zheng2017_facs", "b_cells", "153"]]
    adata.write_h5ad(tmp_path / "cells.h5ad")


def test_duplicates_are_left_out_unless_asked_for(divided) -> None:
    assert datasets.census(uri=divided, obs_filter=None, n_cells=None).n_obs == 600
    assert datasets.census(uri=divided).obs["is_primary_data"].all()
    assert datasets.census(uri=divided, obs_filter="is_primary_data == False").n_obs == 200
    both = "is_primary_data == True or is_primary_data == False"
    assert datasets.census(uri=divided, obs_filter=both).n_obs == 800


def test_samples_are_whole_within_data_sets_and_never_too_many(divided) -> None:
    obs = all_obs(divided)
    sizes = obs[obs["is_primary_data"]].groupby(["dataset_id", "donor_id"], observed=True).size()
    drawn_sets = set()
    for seed in range(10):
        found = datasets.census(uri=divided, n_cells=150, random_state=seed)
        drawn = found.obs.groupby(["dataset_id", "donor_id"], observed=True).size().to_dict()
        assert found.n_obs <= 150
        assert drawn == {sample: sizes[sample] for sample in drawn}
        # none of the others would still fit
        assert sizes.drop(list(drawn)).min() > 150 - found.n_obs
        table = found.uns["scllm"]["census"]["table"].astype({"dataset_id": str, "donor_id": str})
        assert table.set_index(["dataset_id", "donor_id"])["n_cells"].to_dict() == drawn
        drawn_sets.add(tuple(drawn))
    assert len(drawn_sets) > 5


def test_the_same_seed_gives_the_same_cells(divided) -> None:
    first, second = (datasets.census(uri=divided, n_cells=200, random_state=3) for _ in range(2))
    assert_same(first, second)
    other = datasets.census(uri=divided, n_cells=200, random_state=4)
    assert not np.array_equal(other.obs["soma_joinid"], first.obs["soma_joinid"])


def test_samples_can_be_of_another_column(mini) -> None:
    found = datasets.census(uri=mini, n_cells=160, by="cell_type")
    drawn, sizes = (obs["cell_type"].astype(str).value_counts() for obs in (found.obs, all_obs(mini)))
    assert drawn.to_dict() == {name: sizes[name] for name in drawn.index}
    assert datasets.census(uri=mini, n_cells=800, by="dataset_id").n_obs == 800


@pytest.mark.parametrize("name", ["cells.h5ad", "cells.zarr"])
def test_a_file_holds_the_same_as_memory(divided, tmp_path, small_parts, name) -> None:
    expected = datasets.census(uri=divided, n_cells=450)
    path = datasets.census(uri=divided, n_cells=450, out=tmp_path / name)
    assert path == tmp_path / name
    found = ad.read_h5ad(path) if path.suffix == ".h5ad" else ad.read_zarr(path)
    assert_same(found, expected)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    source = open_source(path)
    rows = np.array([400, 3, 99, 100])
    assert (source.read(rows) != expected.X[rows]).nnz == 0


def test_zarr_is_version_3_in_shards(mini, tmp_path, small_parts) -> None:
    import zarr

    data = zarr.open_group(datasets.census(uri=mini, out=tmp_path / "cells.zarr"), mode="r")["X/data"]
    assert data.metadata.zarr_format == 3
    assert data.shards == (2**22,)
    assert data.chunks == (2**16,)


KILLED = """
import os, signal, sys
from scllm import datasets, tl
from scllm.datasets import _download
_download.PART, save = 100, _download._save
def save_and_die(file, matrix):
    save(file, matrix)
    os.kill(os.getpid(), signal.SIGKILL)
_download._save = save_and_die
datasets.census(uri=sys.argv[1], n_cells=450, out=sys.argv[2])
"""


@pytest.mark.parametrize("name", ["cells.h5ad", "cells.zarr"])
def test_a_killed_call_is_resumed_to_the_same_file(divided, tmp_path, small_parts, caplog, name) -> None:
    out, parts = tmp_path / name, tmp_path / f"{name}.parts"
    for n_finished in (1, 2):
        killed = subprocess.run([sys.executable, "-c", KILLED, divided, out], capture_output=True, check=False)
        assert killed.returncode == -signal.SIGKILL
        assert not out.exists()
        assert len(list(parts.glob("*.npz"))) == n_finished
    (parts / "part-00002.new").write_bytes(b"half")  # killed while writing
    first = (parts / "part-00000.npz").stat().st_mtime_ns
    with pytest.raises(ValueError, match=naming("random_state", 1, 0, str(parts))):
        datasets.census(uri=divided, n_cells=450, random_state=1, out=out)
    assert (parts / "part-00000.npz").stat().st_mtime_ns == first
    with caplog.at_level(logging.INFO, "scllm"):
        datasets.census(uri=divided, n_cells=450, out=out)
    assert re.search("resuming: 2 of 5 parts", caplog.text)
    found = ad.read_h5ad(out) if out.suffix == ".h5ad" else ad.read_zarr(out)
    assert_same(found, datasets.census(uri=divided, n_cells=450))
    assert not parts.exists()


def test_a_finished_file_is_kept_and_another_one_is_not_replaced(mini, tmp_path) -> None:
    out = datasets.census(uri=mini, obs_filter=B_CELLS, out=tmp_path / "cells.h5ad")
    written = out.stat().st_mtime_ns
    assert datasets.census(uri=mini, obs_filter=B_CELLS, out=out) == out
    with pytest.raises(FileExistsError, match=naming(str(out), "delete")):
        datasets.census(uri=mini, out=out)
    assert out.stat().st_mtime_ns == written
    (tmp_path / "text.h5ad").write_text("notes")
    with pytest.raises(FileExistsError, match=naming("text.h5ad")):
        datasets.census(uri=mini, out=tmp_path / "text.h5ad")


def test_size_and_time_are_said_before_the_download(mini, caplog) -> None:
    with caplog.at_level(logging.INFO, "scllm"):
        datasets.census(uri=mini, n_cells=700)
    assert re.search(r"downloading 653 cells of 9 samples, 3\.\d MB in memory, a few seconds", caplog.text)


@pytest.fixture
def unreadable(mini, tmp_path) -> tuple[Path, Path, Path]:
    """A SOMA without one of its files, where that is, and where it belongs."""
    copy, aside = tmp_path / "census", tmp_path / "values"
    shutil.copytree(mini, copy)
    (values,) = (copy / HUMAN / "ms" / "RNA" / "X" / "raw" / "__fragments").glob("*/a0.tdb")
    values.rename(aside)
    return copy, aside, values


def test_failed_reads_are_tried_again(mini, unreadable, monkeypatch, caplog) -> None:
    uri, aside, values = unreadable
    monkeypatch.setattr(soma, "_FIRST_WAIT", 0.3)
    comes_back = threading.Timer(0.5, aside.rename, [values])
    comes_back.start()
    found = datasets.census(uri=uri, obs_filter=B_CELLS)
    comes_back.join()
    assert "again in" in caplog.text
    assert (found.X != datasets.census(uri=mini, obs_filter=B_CELLS).X).nnz == 0


def test_reads_that_keep_failing_end_in_an_error(unreadable, monkeypatch) -> None:
    monkeypatch.setattr(soma, "_FIRST_WAIT", 0.01)
    with pytest.raises(ConnectionError, match=naming(153, 5, "a0.tdb")):
        datasets.census(uri=unreadable[0], obs_filter=B_CELLS)


def test_without_a_connection_there_is_an_error_in_seconds(monkeypatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    began = time.monotonic()
    with pytest.raises(FileNotFoundError, match=naming("release.json", "uri=")):
        datasets.census()
    assert time.monotonic() - began < 10


def test_a_connection_that_never_answers_is_given_up(monkeypatch) -> None:
    monkeypatch.setattr(_soma, "_TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(FileNotFoundError, match=naming("release.json", "uri=")):
            datasets.census()
        assert time.monotonic() - began < 10


def test_an_unknown_release_offers_those_that_there_are(tmp_path, monkeypatch) -> None:
    (tmp_path / "release.json").write_text(json.dumps({"stable": "2025-01-30", "2025-01-30": {}, "2023-05-15": {}}))
    serve = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with HTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(_soma, "_RELEASES", f"http://127.0.0.1:{server.server_port}/release.json")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with pytest.raises(KeyError, match=naming("2025-01-31", "2025-01-30", "census_version")):
            datasets.census(census_version="2025-01-31")
        server.shutdown()


def test_a_model_trained_on_the_file_knows_its_samples(mini, tmp_path) -> None:
    out = datasets.census(uri=mini, n_cells=100, out=tmp_path / "cells.zarr")
    config = tl.TrainConfig(steps=1, batch_size=16)
    model = tl.pretrain(out, size="tiny", validation=0, config=config, run_dir=tmp_path / "run")
    entry = ad.read_zarr(out).uns["scllm"]["census"]
    samples = entry["table"].astype({"donor_id": str}).set_index("donor_id")["n_cells"]
    assert model.report.set_index("donor")["n_cells"].to_dict() == samples.to_dict()
    assert set(model.report["dataset"]) == {"zheng2017_facs"}
    assert set(model.report["obs_filter"]) == {entry["params"]["obs_filter"]}
    assert set(model.report["census_version"]) == {"2026-01-01"}


WRONG = {
    "column": ({"obs_filter": "celltype == 'B cell'"}, KeyError, ("'celltype'", "'cell_type'")),
    "quotes": ({"obs_filter": "cell_type == B"}, KeyError, ("'B'", "quotes")),
    "syntax": ({"obs_filter": "cell_type == "}, ValueError, ("obs_filter", "'cell_type == '")),
    "method": ({"obs_filter": "cell_type.startswith('B')"}, ValueError, ("obs_filter", "startswith")),
    "no comparison": ({"obs_filter": "cell_type"}, ValueError, ("obs_filter", "cell_type")),
    "type of value": ({"obs_filter": "cell_type == 3"}, ValueError, ("obs_filter", "cell_type == 3")),
    "type of filter": ({"obs_filter": 3}, TypeError, ("obs_filter", 3)),
    "value": ({"obs_filter": "cell_type == 'B cel'"}, ValueError, ("'B cel'", "'B cell'")),
    "value in list": ({"obs_filter": "cell_type in ['T']"}, ValueError, ("'T'", "'B cell'")),
    "nothing left": ({"obs_filter": f"{B_CELLS} and nnz > 90000"}, ValueError, ("nnz > 90000", "Loosen")),
    "by": ({"by": "donor"}, KeyError, ("'donor'", "'donor_id'")),
    "too few": ({"n_cells": 20}, ValueError, (20, 34, "'cd14_monocytes'")),
    "zero": ({"n_cells": 0}, ValueError, ("n_cells", 0)),
    "part of a cell": ({"n_cells": 1.5}, ValueError, ("n_cells", 1.5)),
    "seed": ({"random_state": -1}, ValueError, ("random_state", -1)),
    "organism": ({"organism": "homo"}, KeyError, ("'homo'", "'homo_sapiens'")),
    "format": ({"out": "cells.csv"}, ValueError, ("cells.csv", ".h5ad")),
    "folder": ({"out": "nowhere/cells.h5ad"}, FileNotFoundError, ("nowhere",)),
}


@pytest.mark.parametrize(("given", "error", "named"), WRONG.values(), ids=WRONG)
def test_bad_input_says_what_was_seen_and_what_to_do(mini, given, error, named) -> None:
    began = time.monotonic()
    with pytest.raises(error, match=naming(*named)):
        datasets.census(uri=mini, **given)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("place", "error"),
    [("nowhere", FileNotFoundError), (HUMAN, ValueError), ("../other", ValueError), ("../file", ValueError)],
)
def test_a_place_that_is_no_census_is_named(mini, place, error) -> None:
    (mini.parent / "other").mkdir(exist_ok=True)
    (mini.parent / "file").write_text("")
    uri = os.path.normpath(mini / place)
    with pytest.raises(error, match=naming(uri)):
        datasets.census(uri=uri)
