"""Matching the genes of a data set to the tokens of a vocabulary."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import naming
from scipy import sparse

from scllm.data.genes import GeneMatch, id_type, match, strip_version
from scllm.data.vocab import Vocab

SYMBOLS = [f"G{i}" for i in range(10)]
ENSEMBL = [f"ENSG{i:011d}" for i in range(10)]


def test_versions_are_stripped_from_ensembl_ids_only():
    assert strip_version(["ENSG00000141510.17", "ENSMUSG00000059552.3", "AC008.2", "TP53"]) == [
        "ENSG00000141510", "ENSMUSG00000059552", "AC008.2", "TP53",
    ]  # fmt: skip


def test_more_than_half_decide_what_names_are():
    assert id_type([*ENSEMBL[:3], *SYMBOLS[:2]]) == "ensembl"
    assert id_type([*ENSEMBL[:2], *SYMBOLS[:2]]) == "symbol"
    assert id_type([]) == "symbol"


@pytest.mark.parametrize("versions", ["data", "vocabulary", "both"])
def test_versions_do_not_stand_in_the_way_of_a_match(versions):
    names = [f"{name}.{i}" for i, name in enumerate(ENSEMBL)] if versions != "vocabulary" else ENSEMBL
    known = [f"{name}.{9 - i}" for i, name in enumerate(ENSEMBL)] if versions != "data" else ENSEMBL
    found = match(names, Vocab.from_genes(known))
    assert found.token_ids.tolist() == list(range(10))
    assert found.id_type == "ensembl"


@pytest.mark.parametrize("column", ["feature_name", "gene_symbols", "symbol"])
def test_the_usual_columns_are_searched(column):
    var = pd.DataFrame({"n": range(10), column: SYMBOLS}, index=ENSEMBL)
    found = match(var.index, Vocab.from_genes(SYMBOLS[::-1]), var=var)
    assert (found.column, found.id_type) == (column, "symbol")
    assert found.token_ids.tolist() == list(range(10))[::-1]


def test_names_are_preferred_where_a_column_fits_no_better():
    var = pd.DataFrame({"symbol": SYMBOLS}, index=SYMBOLS)
    assert match(var.index, Vocab.from_genes(SYMBOLS), var=var).column == "var_names"


def test_names_of_the_vocabularys_own_kind_go_before_those_known_by_aliases():
    ids = [f"ENSG{i:011d}" for i in range(6)]
    symbols = [f"gene{i}" for i in range(6)]
    vocab = Vocab(tuple(ids), None, None, None, aliases=dict(zip(symbols, ids, strict=True)))
    assert match(symbols, vocab).token_ids.tolist() == list(range(6))
    # by symbol all six are found, by Ensembl id four in another order
    few = pd.DataFrame({"ensembl_id": [*ids[2:], "a", "b"]})
    assert match(symbols, vocab, var=few).token_ids.tolist() == [2, 3, 4, 5, -1, -1]
    # too few by Ensembl id
    few = pd.DataFrame({"ensembl_id": [ids[3], *"abcde"]})
    assert match(symbols, vocab, var=few).token_ids.tolist() == list(range(6))


def test_gene_key_decides_and_a_wrong_one_offers_close_names():
    var = pd.DataFrame({"symbol": SYMBOLS, "alias": SYMBOLS[::-1]}, index=ENSEMBL)
    vocab = Vocab.from_genes(SYMBOLS)
    assert match(var.index, vocab, var=var, gene_key="alias").token_ids.tolist() == list(range(10))[::-1]
    with pytest.raises(KeyError, match=r"'alis' is not a column of adata\.var\. Did you mean 'alias'"):
        match(var.index, vocab, var=var, gene_key="alis")
    with pytest.raises(ValueError, match="0 of 10 genes"):
        match(var.index, vocab, var=var, gene_key="var_names")


def test_coverage_is_a_share_of_the_smaller_side():
    few, many = Vocab.from_genes(SYMBOLS[:4]), Vocab.from_genes([*SYMBOLS[:4], *(f"x{i}" for i in range(96))])
    assert match(SYMBOLS, few).coverage == 1.0
    assert match(SYMBOLS, many).coverage == pytest.approx(0.4)
    with pytest.raises(ValueError, match=r"4 of 10 genes \(40 %\) .* at least 50 %"):
        match(SYMBOLS, many, min_coverage=0.5)


def test_specials_are_no_genes_to_match():
    found = match([*SYMBOLS, "<clz>"], Vocab.from_genes(SYMBOLS))
    assert found.n_vocab == 10
    assert found.token_ids[-1] == -1


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.sampled_from([np.float32, np.float64, np.int32]))
def test_columns_of_one_token_are_summed_and_rows_stand_in_the_order_of_tokens(seed, dtype):
    rng = np.random.default_rng(seed)
    token_ids = rng.integers(-1, 6, 9).astype(np.int32)
    dense = rng.integers(0, 3, (4, 9)).astype(dtype)
    found = GeneMatch(token_ids, "var_names", "symbol", 6)
    tokens = found.tokens(sparse.csr_matrix(dense))
    for cell in range(4):
        expected: dict[int, float] = {}
        for gene in range(9):
            if token_ids[gene] >= 0:
                expected[token_ids[gene]] = expected.get(token_ids[gene], 0) + dense[cell, gene]
        row = tokens.take(np.array([cell]))
        assert row.genes.tolist() == sorted(token for token, value in expected.items() if value)
        assert row.values.tolist() == [expected[token] for token in row.genes]
    assert found.measured.tolist() == sorted(set(token_ids[token_ids >= 0].tolist()))
    assert found.n_matched == len(found.measured)


@pytest.mark.parametrize("kind", [sparse.csc_matrix, np.asarray])
def test_counts_that_are_not_csr_are_an_error(kind):
    with pytest.raises(TypeError, match=r"CSR matrix, got '(csc|ndarray)'"):
        GeneMatch(np.arange(3, dtype=np.int32), "var_names", "symbol", 3).tokens(kind(np.eye(3)))


def test_stored_zeros_are_no_tokens():
    counts = sparse.csr_matrix((np.array([0.0, 2.0]), np.array([0, 1]), np.array([0, 2])), shape=(1, 2))
    assert GeneMatch(np.array([0, 1], np.int32), "var_names", "symbol", 2).tokens(counts).genes.tolist() == [1]


def test_duplicated_names_are_named_with_the_first():
    with pytest.raises(ValueError, match=naming(2, "duplicated", "first: 'b'", "var_names_make_unique")):
        match(["a", "b", "b", "c", "c", "c"], Vocab.from_genes(["a", "b", "c"]))


def test_too_few_genes_of_a_small_vocabulary_are_counted_in_the_data():
    with pytest.raises(ValueError, match=naming("1 of 4 genes of the vocabulary", "25 %", "in the data")):
        match([*"ABCDEF"], Vocab.from_genes(["A", "X1", "X2", "X3"]))


@pytest.mark.parametrize("min_coverage", [30, -0.1])
def test_min_coverage_is_a_fraction(min_coverage):
    with pytest.raises(ValueError, match=naming("min_coverage", "0 to 1", min_coverage)):
        match([*"ABC"], Vocab.from_genes([*"ABC"]), min_coverage=min_coverage)
