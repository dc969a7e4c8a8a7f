"""Matching genes to a vocabulary."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pytest
from messages import naming

from scllm.data.vocab import Vocab
from scllm.pp import match_genes, tokenize


@pytest.fixture
def human(adata) -> ad.AnnData:
    """Symbols as names, Ensembl ids with versions in a usual column."""
    adata.var["gene_ids"] = [f"ENSG{i:011d}.{i % 3}" for i in range(adata.n_vars)]
    return adata


def test_symbols_and_ensembl_ids_are_told_apart(human):
    match_genes(human, list(human.var_names[::-1]))
    by_symbol = human.var["token_id"].tolist()
    assert by_symbol == list(range(40))[::-1]
    assert human.uns["scllm"]["match_genes"]["column"] == "var_names"
    match_genes(human, [f"ENSG{i:011d}" for i in reversed(range(40))])
    found = human.uns["scllm"]["match_genes"]
    assert human.var["token_id"].tolist() == by_symbol
    assert (found["column"], found["id_type"], found["n_matched"]) == ("gene_ids", "ensembl", 40)


class Model:
    vocab = Vocab.from_genes([f"gene_{i}" for i in range(5, 40)])


@pytest.mark.parametrize("kind", ["vocab", "model", "list", "index", "file", "path", "folder", "run"])
def test_a_vocabulary_may_come_as_anything_that_holds_one(adata, tmp_path, kind):
    genes = Model.vocab.genes
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "vocab.json").write_text(json.dumps(Model.vocab.to_dict()))
    (tmp_path / "genes.txt").write_text("\n".join(genes))
    given = {
        "vocab": Model.vocab, "model": Model(), "list": list(genes), "index": adata.var_names[5:],
        "file": str(tmp_path / "genes.txt"), "path": tmp_path / "model" / "vocab.json", "folder": tmp_path / "model",
        "run": str(tmp_path),
    }  # fmt: skip
    if kind == "run":
        (tmp_path / "spec.json").write_text("{}")
    match_genes(adata, given[kind])
    assert adata.var["token_id"].tolist() == [-1] * 5 + list(range(35))


def test_a_path_without_a_vocabulary_is_an_error(adata, tmp_path):
    with pytest.raises(FileNotFoundError, match=naming("missing", "vocabulary file", "model folder")):
        match_genes(adata, tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=naming("vocab.json", tmp_path)):
        match_genes(adata, tmp_path)


def test_what_was_lost_is_listed_the_most_expressed_first(adata):
    match_genes(adata, list(adata.var_names[10:]))
    table = adata.uns["scllm"]["match_genes"]["table"]
    means = adata.to_df().iloc[:, :10].mean().sort_values(ascending=False)
    assert set(table["gene"]) == set(means.index)
    np.testing.assert_allclose(table["mean_expression"], means, rtol=1e-6)
    found = adata.uns["scllm"]["match_genes"]
    assert (found["n_data"], found["n_vocab"], found["n_matched"], found["coverage"]) == (40, 30, 30, 1.0)


def test_coverage_below_the_least_one_is_an_error_and_writes_nothing(adata):
    few = [*adata.var_names[:8], *(f"other{i}" for i in range(40))]
    with pytest.raises(ValueError, match=r"8 of 40 genes \(20 %\) .* at least 30 %") as error:
        match_genes(adata, few)
    assert "symbols ('gene_0')" in str(error.value)
    assert "token_id" not in adata.var
    assert "scllm" not in adata.uns
    match_genes(adata, few, min_coverage=0.2)
    assert (adata.var["token_id"] >= 0).sum() == 8


def test_ids_of_another_kind_say_where_to_look(adata):
    ids = [f"ENSG{i:011d}" for i in range(40)]
    with pytest.raises(ValueError, match=r"Ensembl ids .* look like symbols .* `gene_key=`.*gene_name_id_dict\.pkl"):
        match_genes(adata, ids)
    # there is such a dictionary, and it knows others
    vocab = Vocab(tuple(ids), None, None, None, aliases={"TP53": ids[0]})
    with pytest.raises(ValueError, match=r"look like symbols .* Check species and gene names"):
        match_genes(adata, vocab)
    adata.var_names = ids
    with pytest.raises(ValueError, match=r"holds symbols .* look like Ensembl ids .* `gene_key=`\.$"):
        match_genes(adata, ["TP53", "CD3E"])


def test_later_verbs_take_the_settings_over(adata):
    adata.var["symbol"] = adata.var_names[::-1]
    vocab = Vocab.from_genes(adata.var_names)
    tokenize(adata, vocab=vocab)
    by_name = adata.obsm["tokens"].copy()
    match_genes(adata, vocab, gene_key="symbol")
    tokenize(adata, vocab=vocab)
    assert (adata.obsm["tokens"] != by_name).nnz
    few = Vocab.from_genes([*adata.var_names[:8], *(f"other{i}" for i in range(40))])
    with pytest.raises(ValueError, match="at least 30 %"):
        tokenize(adata, vocab=few)
    match_genes(adata, few, min_coverage=0.1)
    with pytest.warns(UserWarning, match=naming("2 of 60 cells", "<cls>")):
        tokenize(adata, vocab=few)


def test_a_copy_leaves_the_original_alone(adata):
    changed = match_genes(adata, list(adata.var_names), copy=True)
    assert "token_id" in changed.var
    assert "token_id" not in adata.var
    assert "scllm" not in adata.uns


def test_names_are_enough(adata):
    names = ad.AnnData(var=adata.var, shape=adata.shape)
    match_genes(names, list(adata.var_names[:30]))
    assert (names.var["token_id"] >= 0).sum() == 30
    assert names.uns["scllm"]["match_genes"]["table"]["gene"].tolist() == list(adata.var_names[30:])


def test_genes_of_another_anndata_are_passed_as_names(adata):
    with pytest.raises(TypeError, match=naming("AnnData", "var_names")):
        match_genes(adata, adata)
