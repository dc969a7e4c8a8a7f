"""A TileDB-SOMA gives the cells that were written to it."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from messages import naming
from scipy import sparse
from threads import read_at_once

from scllm.data import fingerprint as prints
from scllm.data.cells import CellSource
from scllm.data.fingerprint import fingerprint, source_stamp
from scllm.data.source import layer_names, open_source

tiledbsoma = pytest.importorskip("tiledbsoma", reason="needs the extra 'census'")
import pyarrow as pa  # noqa: E402
from somas import write_census, write_soma  # noqa: E402

N_CELLS, N_GENES = 90, 20
ROWS = np.random.default_rng(1).integers(0, N_CELLS, 120)  # any order, with repeats
# consecutive from zero, consecutive from elsewhere, with gaps
IDS = {"plain": np.arange(N_CELLS), "later": np.arange(N_CELLS) + 50, "gaps": 3 * np.arange(N_CELLS) + 7}


@pytest.fixture(scope="module")
def adata() -> AnnData:
    """Counts with empty rows and an empty gene."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.4, (N_CELLS, N_GENES)).astype(np.float32)
    counts[::9], counts[:, 4] = 0, 0
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(np.where(np.arange(N_CELLS) % 3, "A", "B")),
            "age": rng.normal(size=N_CELLS),
            "nnz": (counts > 0).sum(1).astype(np.int64),
        },
        index=[f"cell_{i}" for i in range(N_CELLS)],
    )
    return AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=[f"gene_{i}" for i in range(N_GENES)]))


@pytest.fixture(scope="module")
def written(adata, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("somas")
    columns = ["cell_type", "age", "nnz"]
    return {kind: write_soma(adata, folder / kind, ids=ids, columns=columns) for kind, ids in IDS.items()}


@pytest.fixture(params=IDS)
def source(request, written) -> CellSource:
    return open_source(written[request.param])


def assert_same(block: sparse.csr_matrix, expected: sparse.csr_matrix) -> None:
    assert isinstance(block, sparse.csr_matrix)
    assert block.has_canonical_format
    assert block.dtype == np.float32
    np.testing.assert_array_equal(block.toarray(), expected.toarray())


@pytest.mark.parametrize(
    "rows", [ROWS, np.sort(ROWS), np.arange(20, 60), np.arange(0, N_CELLS, 7), np.array([5]), np.array([], int)]
)
def test_rows_come_in_the_order_asked_for(source, adata, rows) -> None:
    assert_same(source.read(rows), adata.X[rows])


def test_tables_are_those_that_were_written(source, adata) -> None:
    assert isinstance(source, CellSource)
    assert list(source.genes) == list(source.var.index) == list(adata.var_names)
    assert list(source.obs_names) == list(adata.obs_names)
    found = source.obs(["age", "cell_type"]).set_axis(source.obs_names)
    pd.testing.assert_frame_equal(found, adata.obs[["age", "cell_type"]], check_categorical=False)
    with pytest.raises(KeyError, match=naming("'celltype'", "'cell_type'")):
        source.obs(["celltype"])


def test_all_ways_to_name_one_give_the_same_cells(adata, tmp_path, shared, monkeypatch) -> None:
    census = write_census(tmp_path / "census", homo_sapiens=adata)
    monkeypatch.chdir(tmp_path)
    experiment = census / "census_data" / "homo_sapiens"
    for place in (census, f"{census}/", "census", experiment, str(experiment), f"file://{experiment}"):
        source = open_source(place)
        assert_same(source.read(slice(None)), adata.X)
        assert source.path == experiment


def test_a_pickled_or_closed_source_reads_the_same(source, adata) -> None:
    source.read(ROWS)
    assert_same(pickle.loads(pickle.dumps(source)).read(ROWS), adata.X[ROWS])
    source.close()
    assert_same(source.read(ROWS), adata.X[ROWS])


def test_four_threads_read_at_once(source, adata) -> None:
    requests = [ROWS[i:] for i in range(4)]
    for rows, block in zip(requests, read_at_once(source, requests), strict=True):
        assert_same(block, adata.X[rows])


def test_an_open_source_does_not_see_what_is_written_later(adata, tmp_path) -> None:
    path = write_soma(adata, tmp_path / "soma")
    source, before = open_source(path), source_stamp(open_source(path))
    other = {"soma_dim_0": [0], "soma_dim_1": [0], "soma_data": np.array([77], np.float32)}
    with tiledbsoma.open(str(path / "ms" / "RNA" / "X" / "raw"), "w") as matrix:
        matrix.write(pa.table(other))
    source.close()
    assert_same(source.read(slice(None)), adata.X)
    assert open_source(path).read(slice(0, 1))[0, 0] == 77
    assert source_stamp(open_source(path)) != before


def test_the_fingerprint_is_that_of_the_same_cells_in_memory(source, adata) -> None:
    assert fingerprint(source) == fingerprint(open_source(adata))


def test_a_large_one_is_not_read_whole_for_its_fingerprint(written, adata, tmp_path, monkeypatch) -> None:
    whole = fingerprint(open_source(adata))
    monkeypatch.setattr(prints, "_READ_ALL", 10)
    monkeypatch.setattr(prints, "_ROWS", 16)
    monkeypatch.setattr(prints, "_of_all", None)  # is not called
    monkeypatch.setattr(prints, "_known", {})
    counted = fingerprint(open_source(written["gaps"]))
    uncounted = fingerprint(open_source(write_soma(adata, tmp_path / "uncounted")))
    assert uncounted == fingerprint(open_source(tmp_path / "uncounted"))
    assert uncounted != counted
    assert uncounted.split("-")[0] == counted.split("-")[0] == whole.split("-")[0]
    one_more = adata.copy()
    one_more.X = sparse.csr_matrix(adata.X.toarray() + (np.arange(N_CELLS * N_GENES) == 4).reshape(N_CELLS, N_GENES))
    assert fingerprint(open_source(write_soma(one_more, tmp_path / "other"))) != uncounted


def test_layers_are_the_matrices_of_the_measurement(adata, tmp_path) -> None:
    both = write_soma(adata, tmp_path / "both", layers=("raw", "normalised"))
    only = write_soma(adata, tmp_path / "only", layers=("data",), measurements=("protein",))
    assert layer_names(both) == [None, "raw", "normalised"] or layer_names(both) == [None, "normalised", "raw"]
    assert layer_names(only) == [None, "data"]
    assert_same(open_source(both, layer="normalised").read(slice(None)), adata.X)
    assert_same(open_source(only).read(slice(None)), adata.X)
    with pytest.raises(KeyError, match=naming("'counts'", "raw", "normalised")):
        open_source(both, layer="counts")


def test_lists_and_folders_mix_with_files_of_other_genes(adata, tmp_path) -> None:
    adata[:40, ::2].copy().write_h5ad(tmp_path / "a.h5ad")
    write_soma(adata[40:].copy(), tmp_path / "b")
    for data in (tmp_path, [tmp_path / "a.h5ad", tmp_path / "b"]):
        source = open_source(data)
        found = source.read(slice(None))
        assert list(source.obs_names) == list(adata.obs_names)
        expected = adata.X.toarray()
        expected[:40, 1::2] = 0
        np.testing.assert_array_equal(found[:, source.genes.get_indexer(adata.var_names)].toarray(), expected)
        assert [len(table) for table in source.gene_tables.tables] == [N_GENES // 2, N_GENES]
        assert source_stamp(source) is not None


@pytest.mark.parametrize("what", ["organisms", "measurements", "layers", "array", "info", "broken"])
def test_what_cannot_be_read_is_named(what, adata, tmp_path) -> None:
    path = tmp_path / "soma"
    if what == "organisms":
        write_census(path, homo_sapiens=adata, mus_musculus=adata)
        error, named = ValueError, ("mus_musculus", path, "census_data")
    elif what == "info":
        tiledbsoma.Collection.create(str(path)).close()
        error, named = ValueError, (path, "'obs'", "'ms'")
    else:
        some = {"measurements": {"measurements": ("a", "b")}, "layers": {"layers": ("x", "y")}}
        write_soma(adata, path, **some.get(what, {}))
        error, named = (ValueError, ("a", "b")) if what == "measurements" else (KeyError, ("x", "y", "layer="))
    if what == "array":
        path, error, named = path / "ms" / "RNA" / "X" / "raw", ValueError, ("raw", "SparseNDArray")
    if what == "broken":
        shutil.rmtree(path / "obs" / "__schema")
        error, named = OSError, (path,)
    with pytest.raises(error, match=naming(*named)):
        open_source(path)


def test_files_that_disappear_are_an_error_at_once(written, tmp_path) -> None:
    shutil.copytree(written["plain"], tmp_path / "copy")
    source = open_source(tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy")
    with pytest.raises(OSError, match=naming(tmp_path / "copy", "5 cells")):
        source.read(slice(0, 5))


def test_a_missing_package_names_the_extra(written, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tiledbsoma", None)
    for place in (written["plain"], "s3://bucket/soma"):
        with pytest.raises(ImportError, match=naming("scllm-tools[census]")):
            open_source(place)


def test_a_forked_process_opens_its_own(written) -> None:
    code = f"""
import os, signal
from scllm.data.source import open_source
source = open_source({str(written["plain"])!r})
total = source.read(slice(None)).sum()
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if source.read(slice(None)).sum() == total else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
