"""Gene names that are spelt differently from the vocabulary, and other columns that hold matching names."""

from __future__ import annotations

import logging
import re

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from messages import naming

from scllm.data.genes import match
from scllm.data.vocab import Vocab

HUMAN = ["TP53", "HLA-A", "HLA-B", "MT-CO1", "C1orf112", "ACTB", "CD3E", "NKX2-1", "7SK", "LYZ"]
IDS = [f"ENSG{i:011d}" for i in range(10)]
MOUSE = ["Trp53", "Actb", "Cd3e", "Lyz2", "Gapdh", "Nkx2-1", "Malat1", "Il2ra", "Cd4", "Foxp3"]


def tokens(names: list[str], vocab: list[str] = HUMAN, **options) -> list[int]:
    return match(names, Vocab.from_genes(vocab), **options).token_ids.tolist()


@pytest.mark.parametrize(
    "spelt",
    [
        lambda gene, i: f"GRCh38_{gene}", lambda gene, i: f"GRCh38______{gene}", lambda gene, i: f"hg19_{gene}",
        lambda gene, i: f"GRCh38-{gene}", lambda gene, i: f" {gene}", lambda gene, i: f"{gene}\t",
        lambda gene, i: f"{IDS[i]}|{gene}", lambda gene, i: f"{gene}_{IDS[i]}", lambda gene, i: f"{IDS[i]}.7_{gene}",
        lambda gene, i: f"GRCh38_{gene}_{IDS[i]}", lambda gene, i: f"{gene}-1", lambda gene, i: f"{gene}.1",
        lambda gene, i: gene.replace("-", "."), lambda gene, i: gene.replace("-", "_"),
        lambda gene, i: re.sub(r"^(\d)", r"X\1", gene.replace("-", ".")),
    ],
)  # fmt: skip
def test_names_that_can_mean_only_one_gene_are_corrected(spelt):
    assert tokens([spelt(gene, i) for i, gene in enumerate(HUMAN)]) == list(range(10))


@pytest.mark.parametrize("spelt", ["{id}|{gene}", "{gene}_{id}", "GRCh38_{id}"])
def test_ids_are_found_in_names_too(spelt):
    names = [spelt.format(id=f"{name}.3", gene=gene) for name, gene in zip(IDS, HUMAN, strict=True)]
    assert tokens(names, IDS) == list(range(10))


def test_a_corrected_name_never_takes_the_token_of_another_gene():
    # the first HLA-A is there; one of two that may be HLA-B, TP53 twice over
    assert tokens(["HLA-A", "HLA-A-1", "HLA.A", "HLA.B", "HLA_B", "CD3E", "LYZ"]) == [1, -1, -1, -1, -1, 6, 9]
    assert tokens(["A-B", "C", "A_B"], ["A.B", "A-B", "C"]) == [1, 2, -1]
    assert tokens(["A B", "C", "D"], ["A.B", "A-B", "C", "D"]) == [-1, 2, 3]  # may be either


def test_names_that_are_right_are_left_alone():
    names = ["NKX2-1", "MT-CO1", "7SK", "CD3E", "LYZ", "RP11-34P13.7", "AC008.1"]
    assert tokens(names) == [7, 3, 8, 6, 9, -1, -1]


def test_case_is_corrected_only_within_a_species():
    upper = [gene.upper() for gene in HUMAN]
    assert tokens(upper) == list(range(10))  # C1ORF112 among names that are right
    barnyard = [*HUMAN[:5], *MOUSE]
    assert tokens(barnyard) == [0, 1, 2, 3, 4, *[-1] * 10]  # Actb, Cd3e and Nkx2-1 are no ACTB, CD3E and NKX2-1


@pytest.mark.parametrize("prefix", ["", "mm10_"])
def test_mouse_genes_stay_an_error_that_says_orthologues(prefix):
    vocab = Vocab.from_genes([gene.upper() for gene in MOUSE])
    with pytest.raises(ValueError, match=r"Only 0 of 10 genes \(0 %\).*10 names differ only in case.*orthologues"):
        match([prefix + gene for gene in MOUSE], vocab)
    with pytest.raises(ValueError, match="orthologues"):
        match([gene.upper() for gene in MOUSE], Vocab.from_genes(MOUSE))


def test_names_that_stay_unclear_are_counted_in_the_message():
    with pytest.raises(ValueError, match=naming("2 names", "'LYZ-1' and 'LYZ'")):
        match(["LYZ-1", "LYZ.1", *(f"x{i}" for i in range(8))], Vocab.from_genes(HUMAN))


def test_corrections_are_logged_with_numbers_and_an_example(caplog):
    names = [*(f"GRCh38_{gene}" for gene in HUMAN[:6]), "HLA.B ", *HUMAN[6:]]
    with caplog.at_level(logging.INFO, logger="scllm"):
        match(names, Vocab.from_genes(HUMAN))
    assert re.search(naming("5 gene names", "'GRCh38_TP53' is read as 'TP53'"), caplog.text)


def test_any_column_of_text_is_taken_where_names_match_little_and_it_matches_twice_as_much(caplog):
    var = pd.DataFrame({"n": range(10), "chromosome": "chr1", "hgnc": pd.Categorical(HUMAN)}, index=IDS)
    with caplog.at_level(logging.INFO, logger="scllm"):
        found = match(var.index, Vocab.from_genes(HUMAN), var=var)
    assert (found.column, found.token_ids.tolist()) == ("hgnc", list(range(10)))
    assert re.search(naming("var['hgnc']", "10 genes"), caplog.text)
    prefixed = var.assign(hgnc=[f"GRCh38_{gene}" for gene in HUMAN])
    assert match(var.index, Vocab.from_genes(HUMAN), var=prefixed).n_matched == 10


def test_a_column_that_matches_too_little_more_is_proposed_and_not_taken():
    vocab = Vocab.from_genes([f"G{i}" for i in range(100)])
    names = [*(f"G{i}" for i in range(25)), *(f"x{i}" for i in range(75))]
    better = pd.DataFrame({"other": [*(f"G{i}" for i in range(40)), *(f"y{i}" for i in range(60))]}, index=names)
    with pytest.raises(ValueError, match=r"Only 25 of 100 .*var\['other'\] matches 40 %: pass gene_key='other'"):
        match(better.index, vocab, var=better)
    few = pd.DataFrame({"other": [*(f"G{i}" for i in range(20)), *(f"y{i}" for i in range(80))]})
    few.index = [f"x{i}" for i in range(100)]
    with pytest.raises(ValueError, match=r"var\['other'\] matches 20 %: pass gene_key='other'"):
        match(few.index, vocab, var=few)
    assert match(few.index, vocab, var=few, gene_key="other", min_coverage=0.2).n_matched == 20


def test_the_right_column_is_proposed_where_a_wrong_one_was_asked_for():
    var = pd.DataFrame({"wrong": [f"x{i}" for i in range(10)], "feature_name": HUMAN}, index=IDS)
    with pytest.raises(ValueError, match=r"Only 0 of 10.*var\['feature_name'\] matches 100 %: pass gene_key='feature_"):
        match(var.index, Vocab.from_genes(HUMAN), var=var, gene_key="wrong")


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA, ""])
def test_missing_names_in_a_column_are_no_genes(missing):
    var = pd.DataFrame({"hgnc": [missing, *HUMAN[1:]]}, index=IDS)
    assert match(var.index, Vocab.from_genes(HUMAN), var=var).token_ids.tolist() == [-1, *range(1, 10)]


def test_real_names_are_found_again_however_they_were_spelt(shared):
    adata = ad.read_h5ad(shared / "data" / "pbmc_zheng2017_facs.h5ad", backed="r")
    names = adata.var_names
    vocab = Vocab.from_genes(names)
    for spelt in (names.map(lambda name: f"GRCh38_{name}"), names + " ", adata.var["ensembl_id"] + "|" + names):
        assert match(spelt, vocab).token_ids.tolist() == list(range(len(names)))
    r_names = names.map(lambda name: re.sub(r"^(\d)", r"X\1", re.sub("[^A-Za-z0-9_.]", ".", name)))
    found = match(r_names, vocab).token_ids
    assert (found == np.arange(len(names))).mean() > 0.999
    assert set(found) <= {-1, *range(len(names))}
    assert ((found == np.arange(len(names))) | (found == -1)).all()  # none is another gene
