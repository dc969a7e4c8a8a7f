"""The published vocabularies, against plain sets of names."""

from __future__ import annotations

import gzip
import json

import pytest
from anndata import read_h5ad

from scllm.data.vocab import Vocab
from scllm.pp import match_genes

FILES = {
    "scgpt_default_census_vocab": "var_names",
    "scgpt_default_gene_vocab": "var_names",
    "geneformer_v1_token_dictionary": "ensembl_id",
    "scfoundation_gene_list_19264": "var_names",
}


@pytest.fixture(scope="module")
def blood(shared):
    return read_h5ad(shared / "data" / "pbmc_zheng2017_facs.h5ad")


@pytest.mark.parametrize("name", FILES)
def test_published_vocabularies_are_read_in_the_order_of_their_ids(shared, name):
    file = shared / "data" / "dictionaries" / f"{name}.json.gz"
    content = json.loads(gzip.decompress(file.read_bytes()))
    vocab = Vocab.read(file)
    assert len(vocab) == len(content) > 19_000
    ids = content if isinstance(content, dict) else {gene: i for i, gene in enumerate(content)}
    assert vocab.ids(list(ids)).tolist() == list(ids.values())


@pytest.mark.parametrize(("name", "column"), FILES.items())
def test_coverage_is_that_of_the_sets_of_names(shared, blood, name, column):
    vocab = Vocab.read(shared / "data" / "dictionaries" / f"{name}.json.gz")
    found = match_genes(blood, vocab, copy=True).uns["scllm"]["match_genes"]
    names = blood.var_names if column == "var_names" else blood.var[column]
    matched = set(names) & set(vocab.genes)
    # a name that differs only in case is read as the gene, where it can mean no other
    in_other_case = {gene.upper() for gene in set(vocab.genes) - matched} & set(names) - matched
    assert found["n_matched"] == len(matched) + len(in_other_case)
    assert found["column"] == column
    assert found["coverage"] == found["n_matched"] / min(blood.n_vars, len(vocab.genes))


@pytest.mark.parametrize("name", FILES)
def test_most_counts_of_sorted_blood_cells_are_covered(shared, blood, name):
    matched = match_genes(blood, shared / "data" / "dictionaries" / f"{name}.json.gz", copy=True)
    known = (matched.var["token_id"] >= 0).to_numpy()
    # 69 to 88 % of the genes, but those that are lost are little expressed
    assert 0.6 < known.mean() < 0.9
    assert blood.X[:, known].sum() / blood.X.sum() > 0.9
