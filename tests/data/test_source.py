"""The same rows from every storage."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from messages import naming
from scipy import sparse
from threads import read_at_once

from scllm.data import mapped
from scllm.data.arrays import write_arrays
from scllm.data.cells import CellSource
from scllm.data.fingerprint import fingerprint
from scllm.data.source import open_source

N_CELLS, N_GENES = 150, 30
ROWS = np.random.default_rng(1).integers(0, N_CELLS, 200)  # any order, with repeats

STORAGES = [
    *("memory-csr", "memory-csr_array", "memory-csc", "memory-dense", "memory-int64-indices", "memory-unsorted"),
    *("memory-view", "memory-view-csc", "memory-view-dense", "backed", "backed-view"),
    *("h5ad-csr", "h5ad-csr-gzip", "h5ad-csc", "h5ad-dense", "h5ad-dense-gzip", "h5ad-small-chunks"),
    *("zarr2-csr", "zarr3-csr", "zarr3-csc", "zarr3-dense", "zarr3-csr-sharded", "zarr3-small-chunks"),
    *("arrays", "list", "folder"),
]


def make_adata(n_cells: int = N_CELLS, n_genes: int = N_GENES, seed: int = 0) -> AnnData:
    """Counts with empty rows; obs with categories, strings, floats and integers."""
    rng = np.random.default_rng(seed)
    counts = sparse.random(n_cells, n_genes, 0.3, format="csr", rng=rng)
    counts.data = rng.integers(1, 9, counts.nnz).astype(np.float32)
    counts = sparse.diags_array((np.arange(n_cells) % 10 != 3).astype(np.float32)) @ counts
    counts = sparse.csr_matrix(counts, dtype=np.float32)
    counts.eliminate_zeros()
    counts.sort_indices()
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical.from_codes(np.arange(n_cells) % 2, ["A", "B", "unused"]),
            "donor": [f"donor {i}" for i in range(n_cells)],
            "age": rng.normal(size=n_cells),
            "n": np.arange(n_cells),
        },
        index=[f"cell_{i}" for i in range(n_cells)],
    )
    var = pd.DataFrame(
        {"ensembl_id": [f"ENSG{i}" for i in range(n_genes)]}, index=[f"gene_{i}" for i in range(n_genes)]
    )
    return AnnData(counts, obs=obs, var=var, layers={"counts": counts * 2})


def with_matrix(adata: AnnData, matrix) -> AnnData:
    return AnnData(matrix, obs=adata.obs, var=adata.var)


def parent_of(adata: AnnData, form: str) -> AnnData:
    """An AnnData of which rows 150 and down to 1, and all but the last two genes, are `adata`."""
    matrix = sparse.vstack([sparse.csr_matrix((1, N_GENES), dtype=np.float32), adata.X[::-1]])
    matrix = sparse.hstack([matrix, np.full((N_CELLS + 1, 2), 7, np.float32)], format="csr")
    matrix = matrix.toarray() if form == "dense" else matrix.asformat(form or "csr")
    return AnnData(
        matrix,
        obs=pd.concat(
            [adata.obs.iloc[:1].rename(index={"cell_0": "other"}).assign(donor="other"), adata.obs.iloc[::-1]]
        ),
        var=pd.concat([adata.var, pd.DataFrame({"ensembl_id": ["x", "y"]}, index=["x", "y"])]),
    )


def view_of(parent: AnnData) -> AnnData:
    view = parent[np.arange(N_CELLS, 0, -1), :N_GENES]
    assert view.is_view
    return view


def rechunk(group, length: int, **options) -> None:
    """Store the sparse arrays in chunks that rows straddle."""
    for name in ("indices", "data"):
        values = group[name][:]
        del group[name]
        if isinstance(group, h5py.Group):
            group.create_dataset(name, data=values, chunks=(length,), **options)
        else:
            group.create_array(name, data=values, chunks=(length,))


def store(adata: AnnData, storage: str, folder: Path):
    """Put an AnnData away; what comes back is opened by `open_source`."""
    kind, *how = storage.split("-", 1)
    form = how[0] if how else ""
    match kind:
        case "memory" if form.startswith("view"):
            return view_of(parent_of(adata, form[5:]))
        case "memory" if form == "int64-indices":
            matrix = adata.X.copy()
            matrix.indices, matrix.indptr = matrix.indices.astype(np.int64), matrix.indptr.astype(np.int64)
            return with_matrix(adata, matrix)
        case "memory" if form == "unsorted":
            doubled = adata.X.indptr * 2  # each row backwards, each value in two halves
            order = np.concatenate(
                [np.repeat(np.arange(b - 1, a - 1, -1), 2) for a, b in zip(adata.X.indptr[:-1], adata.X.indptr[1:])]
            )
            arrays = adata.X.data[order] / 2, adata.X.indices[order], doubled
            return with_matrix(adata, sparse.csr_matrix(arrays, shape=adata.shape))
        case "memory":
            forms = {"csr": sparse.csr_matrix, "csr_array": sparse.csr_array, "csc": sparse.csc_matrix}
            return with_matrix(adata, adata.X.toarray() if form == "dense" else forms[form](adata.X))
        case "backed":
            path = folder / "backed.h5ad"
            (parent_of(adata, "csr") if form else adata).write_h5ad(path)
            backed = anndata.read_h5ad(path, backed="r")
            return view_of(backed) if form else backed
        case "arrays":
            return write_arrays(open_source(adata), folder / "arrays", obs=list(adata.obs), chunk=40)
        case "list" | "folder":
            parts = [
                with_matrix(adata, adata.X)[rows].copy() for rows in (slice(0, 50), slice(50, 51), slice(51, None))
            ]
            parts[1].X = parts[1].X.toarray()
            parts[0].write_h5ad(folder / "a.h5ad")
            parts[1].write_zarr(folder / "b.zarr")
            parts[2].write_h5ad(folder / "c.h5ad")
            return folder if kind == "folder" else [folder / "a.h5ad", folder / "b.zarr", parts[2]]
    base, *option = form.split("-", 1)
    forms = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "small": sparse.csr_matrix}
    stored = with_matrix(adata, adata.X.toarray() if base == "dense" else forms[base](adata.X))
    path = folder / f"data.{kind.rstrip('23')}"
    if kind == "h5ad":
        stored.write_h5ad(path, compression="gzip" if option == ["gzip"] else None)
        if option == ["chunks"]:
            with h5py.File(path, "a") as file:
                rechunk(file["X"], 7, compression="gzip")
    else:
        shards = None if kind == "zarr2" else option == ["sharded"]
        with anndata.settings.override(zarr_write_format=int(kind[-1]), auto_shard_zarr_v3=shards):
            with warnings.catch_warnings(action="ignore"):  # what zarr 3 says about its own format
                stored.write_zarr(path)
        if option == ["chunks"]:
            import zarr

            rechunk(zarr.open_group(path / "X", mode="a"), 7)
    return path


@pytest.fixture(scope="module")
def adata() -> AnnData:
    return make_adata()


@pytest.fixture(params=STORAGES)
def source(request, adata: AnnData, tmp_path: Path) -> CellSource:
    return open_source(store(adata, request.param, tmp_path))


@pytest.fixture
def h5ad(adata: AnnData, tmp_path: Path) -> Path:
    adata.write_h5ad(tmp_path / "blood.h5ad", compression="gzip")
    return tmp_path / "blood.h5ad"


def assert_same(block: sparse.csr_matrix, expected) -> None:
    assert isinstance(block, sparse.csr_matrix)
    assert block.has_canonical_format
    assert (np.diff(block.indices)[np.diff(np.repeat(np.arange(block.shape[0]), np.diff(block.indptr))) == 0] > 0).all()
    np.testing.assert_array_equal(block.toarray(), expected.toarray())


# every storage


def test_rows_come_in_the_order_asked_for(source, adata):
    assert_same(source.read(ROWS), adata.X[ROWS])


def test_neighbouring_rows_are_read(source, adata):
    assert_same(source.read(slice(20, 90)), adata.X[20:90])


def test_masks_and_negative_positions_select_as_in_numpy(source, adata):
    mask = np.arange(N_CELLS) % 3 == 0
    assert_same(source.read(mask), adata.X[mask])
    assert_same(source.read(np.array([-1, 0])), adata.X[[-1, 0]])


def test_no_rows_give_an_empty_matrix_of_the_same_type(source):
    block = source.read(np.array([], dtype=int))
    assert block.shape == (0, N_GENES)
    assert block.dtype == np.float32


def test_tables_are_those_of_the_adata(source, adata):
    assert (source.n_obs, list(source.genes)) == (N_CELLS, list(adata.var_names))
    pd.testing.assert_frame_equal(source.var, adata.var)
    assert list(source.obs_names) == list(adata.obs_names)
    assert source.obs_columns == list(adata.obs)
    columns = ["age", "donor", "n"]
    pd.testing.assert_frame_equal(source.obs(columns), adata.obs[columns].reset_index(drop=True))
    # a list or a folder has the categories that are in use in its parts
    assert list(source.obs(["cell_type"])["cell_type"]) == list(adata.obs["cell_type"])


def test_fingerprint_does_not_depend_on_the_storage(source, adata):
    assert fingerprint(source) == fingerprint(open_source(adata))


def test_pickled_source_reads_the_same(source, adata):
    assert_same(pickle.loads(pickle.dumps(source)).read(ROWS), adata.X[ROWS])


def test_source_is_a_source_and_opens_as_itself(source):
    assert isinstance(source, CellSource)
    assert open_source(source) is source


def test_closed_source_opens_again(source, adata):
    source.read(ROWS)
    source.close()
    assert_same(source.read(ROWS), adata.X[ROWS])


def test_four_threads_read_at_once(source, adata):
    requests = [ROWS[i:] for i in range(4)]
    for rows, block in zip(requests, read_at_once(source, requests), strict=True):
        assert_same(block, adata.X[rows])


def test_forked_process_opens_its_own_handle(h5ad, adata):
    source = open_source(h5ad)
    source.read(ROWS)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, str(source.read(ROWS).sum()).encode())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert float(os.read(reader, 100)) == adata.X[ROWS].sum()
    assert_same(source.read(ROWS), adata.X[ROWS])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_small_matrix_reads_the_same_everywhere(data, tmp_path_factory):
    n_cells, n_genes = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    dtype = data.draw(st.sampled_from(["f4", "f8", "i4", "i8", "u1", "f2"]))
    values = data.draw(st.lists(st.sampled_from([0, 0, 1, 7]), min_size=n_cells * n_genes, max_size=n_cells * n_genes))
    dense = np.array(values, dtype).reshape(n_cells, n_genes)
    rows = np.array(data.draw(st.lists(st.integers(0, n_cells - 1), max_size=8)), int)
    folder = tmp_path_factory.mktemp("small")
    in_memory = AnnData(dense if dtype == "f2" else sparse.csr_matrix(dense))
    in_memory.write_h5ad(folder / "a.h5ad")
    arrays = write_arrays(open_source(in_memory), folder / "arrays", chunk=2)
    for opened in (in_memory, folder / "a.h5ad", arrays):
        block = open_source(opened).read(rows)
        assert_same(block, sparse.csr_matrix(dense.astype("f4"))[rows])
        assert block.dtype == (np.float32 if dtype == "f2" else dtype)


# what one storage promises


@pytest.mark.parametrize(
    ("storage", "is_chunked"), [("memory-csr", False), ("arrays", False), ("h5ad-csr", True), ("zarr3-csr", True)]
)
def test_sources_on_disk_ask_for_chunks_of_rows(storage, is_chunked, adata, tmp_path):
    source = open_source(store(adata, storage, tmp_path))
    assert source.chunked == is_chunked
    assert 64 <= source.chunk_rows <= 256 if is_chunked else source.chunk_rows == 1


@pytest.mark.parametrize("storage", ["memory-csr", "arrays", "h5ad-csr", "zarr3-csr"])
def test_sources_that_store_rows_know_their_lengths(storage, adata, tmp_path):
    source = open_source(store(adata, storage, tmp_path))
    np.testing.assert_array_equal(source.lengths, [source.read([row]).nnz for row in range(source.n_obs)])


def test_view_does_not_copy_its_parent(adata):
    source = open_source(adata[10:20, 5:])
    assert source._store._store._matrix is adata.X


def test_pickled_view_leaves_its_adata_behind(adata):
    obs = open_source(adata[10:20])._tables._obs
    assert type(obs) is pd.DataFrame


def test_view_may_repeat_and_reorder(adata):
    view = adata[[5, 2, 5], ["gene_3", "gene_1"]]
    assert_same(open_source(view).read(slice(None)), adata.X[[5, 2, 5]][:, [3, 1]])


def test_backed_adata_brings_its_own_obs(h5ad):
    backed = anndata.read_h5ad(h5ad, backed="r")
    backed.obs["new"] = 1.5
    assert open_source(backed).obs(["new"])["new"].eq(1.5).all()


def test_layer_is_read_from_memory_backed_and_file(adata, h5ad):
    for opened in (adata, anndata.read_h5ad(h5ad, backed="r"), h5ad, adata[:], [h5ad]):
        source = open_source(opened, layer="counts")
        assert source.layer == "counts"
        assert_same(source.read(ROWS), adata.layers["counts"][ROWS])


def test_layers_differ_in_fingerprint(adata):
    assert fingerprint(open_source(adata)) != fingerprint(open_source(adata, layer="counts"))


def test_stored_zeros_stay():
    matrix = sparse.csr_matrix((np.array([0.0, 2.0]), np.array([0, 1]), np.array([0, 2])), shape=(1, 3))
    assert open_source(AnnData(matrix)).read(slice(None)).nnz == 2


OF_COLUMNS = """
import sys, numpy as np
from scllm.data.source import open_source
print(open_source(sys.argv[1]).read(np.arange(5)).sum(), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def by_columns(adata, tmp_path, monkeypatch):
    """A file stored by columns, and a folder of its own for temporary files."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return store(adata, "h5ad-csc", tmp_path)


def copies(tmp_path):
    return [path.name for path in tmp_path.glob("scllm-*/*") if path.suffix != ".lock"]


def reading(path):
    process = subprocess.Popen(
        [sys.executable, "-c", OF_COLUMNS, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return process, float(process.stdout.readline())


def test_columns_are_rewritten_once_for_all_that_read_a_file(adata, by_columns, tmp_path, monkeypatch):
    transposed, transpose = [], mapped._transpose
    monkeypatch.setattr(mapped, "_transpose", lambda *args: transposed.append(args) or transpose(*args))
    for _ in range(2):
        source = open_source(by_columns)
        assert_same(source.read(ROWS), adata.X[ROWS])
        assert_same(pickle.loads(pickle.dumps(source)).read(ROWS), adata.X[ROWS])
        source.close()
        assert_same(source.read(ROWS), adata.X[ROWS])
    assert len(transposed) == 1
    assert len(copies(tmp_path)) == 1


def test_a_file_by_columns_that_is_written_again_is_rewritten_again(adata, by_columns, tmp_path):
    open_source(by_columns).read(ROWS)
    adata = with_matrix(adata, sparse.csc_matrix(adata.X * 2))
    adata.write_h5ad(by_columns)
    assert_same(open_source(by_columns).read(ROWS), sparse.csr_matrix(adata.X)[ROWS])


def test_processes_share_what_was_rewritten_and_the_last_removes_it(adata, by_columns, tmp_path):
    first, total = reading(by_columns)
    inode = next(tmp_path.glob("scllm-*/rows-*/data.npy")).stat().st_ino
    second, again = reading(by_columns)
    assert total == again == adata.X[:5].sum()
    first.communicate("\n")
    assert next(tmp_path.glob("scllm-*/rows-*/data.npy")).stat().st_ino == inode
    second.communicate("\n")
    assert not copies(tmp_path)


def test_what_a_killed_process_left_is_removed_by_the_next(adata, by_columns, tmp_path):
    process, _ = reading(by_columns)
    process.kill()
    process.communicate()
    left = copies(tmp_path)
    other = tmp_path / "other.h5ad"
    AnnData(sparse.csc_matrix(adata.X * 2)).write_h5ad(other)
    process, _ = reading(other)
    assert not set(copies(tmp_path)) & set(left)
    process.communicate("\n")
    assert not copies(tmp_path)


def test_many_column_blocks_give_the_same_rows(adata, tmp_path, monkeypatch):
    monkeypatch.setattr("scllm.data.mapped.BLOCK", 50)
    monkeypatch.setattr("scllm.data.storage.runs.__defaults__", (50,))
    for storage in ("h5ad-csc", "h5ad-csr", "zarr3-csr"):
        (tmp_path / storage).mkdir()
        source = open_source(store(adata, storage, tmp_path / storage))
        assert_same(source.read(ROWS), adata.X[ROWS])


def test_opening_a_list_rewrites_nothing_yet(adata, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="scllm"):
        source = open_source([store(adata, "h5ad-csc", tmp_path)])
    assert "rewriting" not in caplog.text
    assert_same(source.read(ROWS), adata.X[ROWS])


def test_file_open_for_writing_elsewhere_is_read(h5ad, adata):
    backed = anndata.read_h5ad(h5ad, backed="r+")
    assert_same(open_source(backed).read(ROWS), adata.X[ROWS])
    backed.file.close()
    assert_same(open_source(backed).read(ROWS), adata.X[ROWS])


def test_too_small_a_disk_for_rewriting_is_an_error(adata, tmp_path, monkeypatch):
    source = open_source(store(adata, "h5ad-csc", tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))
    with pytest.raises(OSError, match=naming("got 0.0 GB", "data.h5ad", "TMPDIR")):
        source.read(ROWS)


def test_each_compressed_chunk_is_read_once(adata, tmp_path, monkeypatch):
    source = open_source(store(adata, "zarr3-small-chunks", tmp_path))
    asked = []
    slices = source._store._slice
    monkeypatch.setattr(source._store, "_slice", lambda *span: (asked.append(span), slices(*span))[1])
    source.read(np.arange(N_CELLS)[::-1])
    assert len(asked) == 2  # indices and data


# concatenation


def test_genes_are_united_in_order_of_appearance():
    first, second = make_adata(4, 3), make_adata(5, 4, seed=1)
    first.var_names, second.var_names = ["b", "a", "c"], ["d", "c", "b", "e"]
    source = open_source([first, second])
    assert list(source.genes) == ["b", "a", "c", "d", "e"]
    expected = pd.concat([first.to_df(), second.to_df()]).fillna(0)[list(source.genes)]
    rows = np.array([8, 0, 3, 4, 8])
    assert_same(source.read(rows), sparse.csr_matrix(expected.to_numpy()[rows]))


def test_part_alone_has_the_type_of_all():
    first, second = make_adata(4), make_adata(5)
    first.X = first.X.astype(np.float64)
    assert open_source([first, second]).read(np.array([6])).dtype == np.float64


def test_categories_of_parts_are_united():
    first, second = make_adata(4), make_adata(5)
    second.obs["cell_type"] = pd.Categorical(["C"] * 5)
    united = open_source([first, second]).obs(["cell_type"])["cell_type"]
    assert list(united.cat.categories) == ["A", "B", "unused", "C"]
    assert list(united) == ["A", "B", "A", "B", *["C"] * 5]


def test_missing_column_names_the_file_and_a_close_name(h5ad, adata):
    other = adata.copy()
    other.obs["celltype"] = "A"
    source = open_source([other, h5ad])
    with pytest.raises(
        KeyError, match=r"'celltype' is not a column of obs in '.*blood.h5ad'. Did you mean 'cell_type'"
    ):
        source.obs(["celltype"])
    assert "celltype" not in source.obs_columns


def test_repeated_gene_names_cannot_be_concatenated():
    adata = make_adata(3, 2)
    adata.var_names = ["a", "a"]
    with pytest.raises(ValueError, match=naming("'a'", "adata", "var_names_make_unique")):
        open_source([adata, adata])


# memory-mapped arrays


def test_arrays_keep_tables_exactly(adata, tmp_path):
    rows = np.array([7, 3, 3, 149])
    written = adata.copy()
    written.obs["maybe"] = pd.array([None, *range(N_CELLS - 1)], dtype="Int64")
    opened = open_source(written, layer="counts")
    source = open_source(write_arrays(opened, tmp_path / "run" / "data", obs=opened.obs_columns, rows=rows))
    found = source.obs(source.obs_columns).set_axis(source.obs_names)
    pd.testing.assert_frame_equal(found, written.obs.iloc[rows])
    pd.testing.assert_frame_equal(source.var, adata.var)
    assert source.layer == "counts"
    assert_same(source.read(slice(None)), adata.layers["counts"][rows])


def test_missing_strings_are_written_as_missing_categories(adata, tmp_path):
    written = adata.copy()
    written.obs["donor"] = written.obs["donor"].astype(object).where(written.obs["n"] > 2)
    source = open_source(write_arrays(open_source(written), tmp_path / "arrays", obs=["donor"]))
    assert source.obs(["donor"])["donor"].isna().sum() == 3


def test_arrays_know_their_layer(adata, tmp_path):
    folder = write_arrays(open_source(adata, layer="counts"), tmp_path / "arrays")
    assert open_source(folder, layer="counts").layer == "counts"
    with pytest.raises(KeyError, match=naming("layer 'raw'", "'counts'", "no .raw")):
        open_source(folder, layer="raw")


def test_whole_copy_is_not_overwritten_but_a_partial_one_is(adata, tmp_path):
    (tmp_path / "arrays").mkdir()
    (tmp_path / "arrays" / "data.npy").write_bytes(b"partial")
    folder = write_arrays(open_source(adata), tmp_path / "arrays")
    with pytest.raises(FileExistsError, match=naming(f"'{folder}'")):
        write_arrays(open_source(adata), folder)


def test_arrays_without_cells_or_values_open(tmp_path):
    empty = AnnData(sparse.csr_matrix((3, 2), dtype=np.float32))
    for name, rows in (("none", slice(0, 0)), ("zeros", None)):
        source = open_source(write_arrays(open_source(empty), tmp_path / name, rows=rows))
        assert source.read(slice(None)).shape == (source.n_obs, 2)


# errors


def test_missing_layer_names_the_layers_there_are(adata, h5ad):
    for opened in (adata, h5ad, adata[:5]):
        with pytest.raises(KeyError, match=naming("layer 'raw'", "'counts'", "no .raw")):
            open_source(opened, layer="raw")


def test_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=naming("nothing.h5ad'", f"'{Path.cwd()}'")):
        open_source(tmp_path / "nothing.h5ad")


def test_folder_without_data_says_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=naming(f"'{tmp_path}'", "'notes.txt'")):
        open_source(tmp_path)


def test_other_file_is_an_error(tmp_path):
    (tmp_path / "counts.h5ad").write_text("gene,cell")
    with pytest.raises(ValueError, match=naming("counts.h5ad'", "HDF5")):
        open_source(tmp_path / "counts.h5ad")


def test_file_of_another_kind_is_an_error(tmp_path):
    with h5py.File(tmp_path / "matrix.h5ad", "w") as file:
        file["matrix"] = np.zeros(3)
    with pytest.raises(ValueError, match=naming("matrix.h5ad'", "table 'obs'")):
        open_source(tmp_path / "matrix.h5ad")


@pytest.mark.parametrize("data", [None, 3, [], {"a": 1}, np.zeros((2, 2))])
def test_anything_else_is_a_type_error(data):
    with pytest.raises(TypeError, match=naming("data", "AnnData", f"got {type(data).__name__}")):
        open_source(data)


def test_adata_without_matrix_is_an_error(adata, tmp_path):
    bare = AnnData(obs=adata.obs, var=adata.var, layers={"counts": adata.X})
    with pytest.raises(KeyError, match=naming("adata.X", "None", "`layer=`")):
        open_source(bare)
    bare.write_h5ad(tmp_path / "bare.h5ad")
    with pytest.raises(KeyError, match=naming("matrix X", "bare.h5ad'", "'counts'")):
        open_source(tmp_path / "bare.h5ad")


def test_layer_of_an_open_source_cannot_change(adata):
    with pytest.raises(ValueError, match=naming("layer None", "'counts'")):
        open_source(open_source(adata), layer="counts")


@pytest.mark.parametrize("rows", [[N_CELLS], [-N_CELLS - 1]])
def test_rows_out_of_range_are_an_error(rows, source):
    with pytest.raises(IndexError, match=naming("150 cells", "-150 to 149", f"got {rows[0]} to {rows[0]}")):
        source.read(np.array(rows))


@pytest.mark.parametrize("rows", [np.array([0.5]), np.zeros((2, 2), int), np.ones(3, bool)])
def test_rows_of_another_kind_are_an_error(rows, adata):
    with pytest.raises(TypeError, match=naming("rows", 150, f"{rows.dtype} of shape {rows.shape}")):
        open_source(adata).read(rows)


# files that go away


@pytest.mark.parametrize("storage", ["h5ad-csr-gzip", "h5ad-dense", "arrays"])
def test_file_deleted_while_open_is_read_to_the_end(storage, adata, tmp_path):
    source = open_source(store(adata, storage, tmp_path))
    for path in tmp_path.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert_same(source.read(ROWS), adata.X[ROWS])


@pytest.mark.parametrize("storage", ["zarr2-csr", "zarr3-csr", "zarr3-dense"])
def test_deleted_zarr_is_an_error_and_never_zeros(storage, adata, tmp_path):
    source = open_source(store(adata, storage, tmp_path))
    source.read(slice(0, 10))
    shutil.rmtree(tmp_path / "data.zarr")
    with pytest.raises(OSError, match=r"data.zarr' could not be read \(rows 20 to 29\)"):
        source.read(slice(20, 30))


def test_damaged_file_is_an_error_that_names_file_and_rows(h5ad):
    source = open_source(h5ad)
    with h5py.File(h5ad) as file:
        offset = file["X/data"].id.get_chunk_info(0).byte_offset
    with open(h5ad, "r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 40)
    with pytest.raises(OSError, match=r"blood.h5ad' could not be read \(rows 0 to 149\)"):
        source.read(slice(None))


def test_shortened_arrays_are_an_error_and_not_a_crash(adata, tmp_path):
    folder = write_arrays(open_source(adata), tmp_path / "arrays")
    source = open_source(folder)
    os.truncate(folder / "data.npy", 200)
    with pytest.raises(OSError, match=r"shorter than when it was opened"):
        source.read(ROWS)


def test_pickle_of_a_deleted_file_is_an_error_when_read(h5ad):
    pickled = pickle.dumps(open_source(h5ad))
    h5ad.unlink()
    with pytest.raises(OSError, match=r"blood.h5ad"):
        pickle.loads(pickled).read(slice(0, 3))


@pytest.mark.filterwarnings("ignore:Element:anndata.OldFormatWarning")
def test_categories_as_anndata_0_7_wrote_them_are_read(tmp_path):
    adata = make_adata(3)
    adata.obs = pd.DataFrame(index=adata.obs_names)
    adata.obs["n"] = 1
    adata.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        obs = file["obs"]
        obs["ct"] = np.array([1, 0, -1], np.int8)
        obs["__categories/ct"] = np.array(["A", "B"], dtype=h5py.string_dtype())
        obs["ct"].attrs["categories"] = obs["__categories/ct"].ref
        obs.attrs["column-order"] = np.array(["n", "ct"], dtype=h5py.string_dtype())
        obs.attrs["encoding-version"] = "0.1.0"
        obs["__categories/ct"].attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
    expected = anndata.read_h5ad(tmp_path / "a.h5ad").obs["ct"]
    found = open_source(tmp_path / "a.h5ad").obs(["ct"])["ct"]
    assert found.astype(object).where(found.notna(), None).tolist() == ["B", "A", None]
    pd.testing.assert_series_equal(found, expected.reset_index(drop=True), check_names=False)


def test_dense_matrices_as_anndata_0_7_wrote_them_are_read(adata, tmp_path):
    with_matrix(adata, adata.X.toarray()).write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        del file["X"].attrs["encoding-type"], file["X"].attrs["encoding-version"]
    assert_same(open_source(tmp_path / "a.h5ad").read(ROWS), adata.X[ROWS])


def test_sparse_matrices_as_anndata_0_6_wrote_them_are_to_be_written_again(h5ad):
    with h5py.File(h5ad, "r+") as file:
        del file["X"].attrs["encoding-type"], file["X"].attrs["encoding-version"]
    with pytest.raises(TypeError, match=r"'X' in '.*' is stored as a group without 'encoding-type'.*Read the file"):
        open_source(h5ad)


def test_columns_of_other_types_of_categories_are_united(tmp_path):
    first, second = make_adata(4), make_adata(3)
    first.obs["cluster"] = pd.Categorical([1, 2, 2, None])
    second.obs["cluster"] = pd.Categorical(["1", "3", "1"])
    united = open_source([first, second]).obs(["cluster"])["cluster"]
    assert united.astype(object).where(united.notna(), None).tolist() == ["1", "2", "2", None, "1", "3", "1"]


def test_a_missing_layer_of_data_without_any_is_not_to_be_passed():
    with pytest.raises(KeyError, match=naming("'counts'", "neither layers nor .raw", "X")):
        open_source(AnnData(np.ones((3, 2), np.float32)), layer="counts")
