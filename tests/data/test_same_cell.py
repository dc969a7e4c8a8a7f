"""A cell's tokens depend on its genes and their counts, and on nothing else that a file says."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from scllm.data.arrays import write_arrays
from scllm.data.encode import BinEncoder, DepthEncoder, LevelEncoder, RankEncoder, ValueEncoder
from scllm.data.encode.depth import SOURCE, TARGET
from scllm.data.genes import match
from scllm.data.matching import match_source
from scllm.data.source import open_source
from scllm.data.vocab import Vocab
from scllm.engine.loader import Loader

GENES = [f"g{i}" for i in range(60)]
# versions of one Ensembl gene share a token
ENSEMBL = [f"ENSG{i % 20:011d}.{i // 20}" for i in range(60)]
SPECIALS = ["<cls>", "<pad>", "<mask>", "<eos>", TARGET, SOURCE]
VOCAB = Vocab.from_tokens([*np.random.default_rng(0).permutation(GENES).tolist(), *SPECIALS])
FEWER = Vocab.from_tokens([*np.random.default_rng(0).permutation([f"ENSG{i:011d}" for i in range(20)]), *SPECIALS])
MEDIANS = np.where(np.arange(66) % 7, 1 + np.arange(66) % 3, np.nan)
ENCODERS = {
    "bins": BinEncoder(7, max_len=12),
    "bins with zeros": BinEncoder(7, max_len=40, include_zeros=True),
    "bins with random ties": BinEncoder(51, max_len=12, ties="random"),
    "ranks": RankEncoder(12, True, True, MEDIANS),
    "ranks by count": RankEncoder(9),
    "values": ValueEncoder(12, include_zeros=False),
    "values with zeros": ValueEncoder(40, include_zeros=True),
    "levels": LevelEncoder(6, 12),
    "depth": DepthEncoder("f2", 14),
    "depth of logged values": DepthEncoder(max_len=14, normalised=True),
}


def cells(seed, names, dtype="float32"):
    """Counts with many ties, or logged values, of a few cells; one is empty."""
    rng = np.random.default_rng(seed)
    dense = rng.geometric(0.5, (6, len(names))) * (rng.random((6, len(names))) < rng.random((6, 1)))
    dense[2] = 0
    values = np.log1p(dense * 0.37) if dtype == "logged" else dense.astype(dtype)
    return AnnData(
        sparse.csr_matrix(values), pd.DataFrame(index=[f"c{i}" for i in range(6)]), pd.DataFrame(index=names)
    )


def encoded(adata, encoder, vocab, keys=None):
    source = open_source(adata)
    found = match(source.genes, vocab, var=source.var)
    return encoder(found.tokens(source.read(slice(None))), vocab, keys, measured=found.measured)


def assert_equal(found, expected):
    np.testing.assert_array_equal(found.indptr, expected.indptr)
    np.testing.assert_array_equal(found.genes, expected.genes)
    assert (found.values is None) == (expected.values is None)
    if found.values is not None:
        np.testing.assert_array_equal(found.values, expected.values)


@pytest.mark.parametrize("encoder", ENCODERS)
@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32), st.booleans(), st.booleans(), st.sampled_from(["float32", "float64", "int32", "logged"]))
def test_tokens_do_not_depend_on_the_order_of_columns(encoder, seed, in_training, with_twins, dtype):
    names, vocab = (ENSEMBL, FEWER) if with_twins else (GENES, VOCAB)
    chosen, keys = ENCODERS[encoder], np.arange(6) if in_training else None
    if with_twins and encoder == "ranks":
        chosen = RankEncoder(12, True, True, MEDIANS[: len(FEWER)])
    adata = cells(seed, names, dtype)
    moved = adata[:, np.random.default_rng(seed).permutation(60)].copy()
    assert_equal(encoded(moved, chosen, vocab, keys), encoded(adata, chosen, vocab, keys))


@pytest.mark.parametrize("encoder", ENCODERS)
@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**32), st.sampled_from(["csc", "dense", "float64", "int64"]))
def test_tokens_do_not_depend_on_how_counts_are_stored(encoder, seed, form):
    adata = cells(seed, GENES)
    stored = adata.copy()
    match form:
        case "csc":
            stored.X = sparse.csc_matrix(adata.X)
        case "dense":
            stored.X = adata.X.toarray()
        case dtype:
            stored.X = adata.X.astype(dtype)
    assert_equal(encoded(stored, ENCODERS[encoder], VOCAB), encoded(adata, ENCODERS[encoder], VOCAB))


def sequences(data, encoder, vocab=VOCAB, training=False):
    """Token sequence of each cell as a model is given it: genes and values."""
    source = open_source(data)
    rows = np.arange(source.n_obs)
    loader = Loader(source, rows, match_source(source, vocab), encoder, vocab, 4, training=training)
    found = {}
    for batch, read in zip((parts[0] for parts in loader.epoch(0)), reads(loader), strict=True):
        values = batch.genes * 0 if batch.values is None else batch.values
        pairs = zip(batch.genes.split(batch.lengths), values.split(batch.lengths), strict=True)
        found |= {row: (genes.tolist(), value.tolist()) for row, (genes, value) in zip(read, pairs, strict=True)}
    return [found[row] for row in rows]


def reads(loader):
    """The rows of each batch."""
    return (rows.tolist() for read in loader._plan(0) for rows in np.split(read.rows, np.cumsum(read.sizes)[:-1]))


@pytest.mark.parametrize("encoder", ENCODERS)
@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**32), st.booleans())
def test_tokens_do_not_depend_on_the_file_its_place_in_a_list_or_the_other_files(encoder, seed, with_lost_genes):
    rng = np.random.default_rng(seed)
    adata, file_of = cells(seed, GENES), rng.integers(0, 3, 6)
    n_genes = rng.integers(30, 60, 3) if with_lost_genes else [60] * 3
    files = [adata[file_of == i, rng.permutation(60)[: n_genes[i]]].copy() for i in rng.permutation(3)]
    files = [file for file in files if file.n_obs]
    alone = [sequence for file in files for sequence in sequences(file, ENCODERS[encoder])]
    assert sequences(files, ENCODERS[encoder]) == alone
    if not with_lost_genes:
        whole = dict(zip(adata.obs_names, sequences(adata, ENCODERS[encoder]), strict=True))
        assert alone == [whole[name] for file in files for name in file.obs_names]


@pytest.fixture
def two_files():
    """Two sets of cells, each with genes that the other does not have."""
    return cells(1, GENES)[:, :45].copy(), cells(2, GENES)[:, 59:15:-1].copy()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_genes_that_a_file_did_not_measure_are_no_zeros_in_memory_on_disk_and_in_a_copy(
    two_files, tmp_path, encoder, training
):
    expected = sequences(two_files[0], ENCODERS[encoder], training=training)
    for i, file in enumerate(two_files):
        file.write_h5ad(tmp_path / f"{i}.h5ad")
    on_disk = [tmp_path / "0.h5ad", tmp_path / "1.h5ad"]
    copied = write_arrays(open_source(list(two_files)), tmp_path / "copy")
    of_copy = write_arrays(open_source([copied, tmp_path / "1.h5ad"]), tmp_path / "again")
    for data in (list(two_files), on_disk, copied, of_copy):
        assert sequences(data, ENCODERS[encoder], training=training)[:6] == expected
    swapped = sequences(list(two_files[::-1]), ENCODERS[encoder])
    assert swapped[:6] == sequences(two_files[1], ENCODERS[encoder])


def test_a_copy_of_some_rows_keeps_which_file_each_is_from(two_files, tmp_path):
    rows = np.array([7, 0, 11, 3])
    copied = write_arrays(open_source(list(two_files)), tmp_path / "copy", rows=rows)
    whole = sequences(list(two_files), ENCODERS["values with zeros"])
    assert sequences(copied, ENCODERS["values with zeros"]) == [whole[row] for row in rows]


def test_files_that_name_their_genes_differently_are_each_matched_as_if_alone(two_files):
    first, second = two_files
    second.var["feature_name"] = second.var_names
    second.var_names = [f"ENSG{i:011d}" for i in range(second.n_vars)]
    encoder = ENCODERS["bins"]
    assert sequences([first, second], encoder) == sequences(first, encoder) + sequences(second, encoder)


def test_the_file_whose_genes_do_not_match_is_named(two_files, tmp_path):
    first, second = two_files
    second.var_names = [f"ENSG{i:011d}" for i in range(second.n_vars)]
    second.write_h5ad(tmp_path / "second.h5ad")
    with pytest.raises(ValueError, match="0 of 44 genes") as raised:
        match_source(open_source([first, tmp_path / "second.h5ad"]), VOCAB)
    assert "second.h5ad" in raised.value.__notes__[0]
