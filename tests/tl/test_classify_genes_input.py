"""What classify_genes refuses, and how it says so."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from scllm import models
from scllm.models import CellModel, scgpt
from scllm.tl import TrainConfig, classify_genes


class NoGenes(scgpt.Model):
    """A model of a family whose tokens are no genes."""

    reads_genes = False


def without_genes(model: CellModel) -> CellModel:
    changed = NoGenes(model.config, model.vocab, model.encoder)
    changed.family = "patches"
    return changed


def series(values, names=None) -> pd.Series:
    return pd.Series(values, names if names is not None else [f"gene_{i}" for i in range(len(values))])


TEN = ["a", "b"] * 5
# what is called, the error, and the three parts of its message
BAD = {
    "one class": ({"labels": series(["a"] * 10)}, ValueError,
                  r"hold 1 class of labels \('a'\)", "at least 2 expected", "Label genes of another class"),
    "one class in the data": ({"labels": series([*["a"] * 10, "b"], [*[f"gene_{i}" for i in range(10)], "far"])},
                              ValueError, r"hold 1 class of labels \('a'\)", "at least 2 expected", "Label genes"),
    "no gene in the data": ({"labels": series(TEN, [f"far_{i}" for i in range(10)])}, ValueError,
                            r"none of the 10 labelled genes is in the data \(first: 'far_0'",
                            "symbols or Ensembl ids that the data have expected", "Add the other kind of names"),
    "fewer genes than folds": ({"labels": series(["a"] * 9 + ["b"] * 3)}, ValueError, "3 genes of class 'b'",
                               "n_folds=5 or more expected", "Pass fewer folds"),
    "labelled twice": ({"labels": series(TEN, ["gene_0", *[f"gene_{i}" for i in range(9)]])}, ValueError,
                       r"1 genes are labelled more than once \(first: 'gene_0': 'a', 'b'\)",
                       "one label a gene expected", "Drop the repeats"),
    "no label": ({"labels": series([None] * 5)}, ValueError, "labels holds no label at all",
                 "at least two classes expected", "Pass the labels"),
    "numbers": ({"labels": series([0.5, 1.5, 2.5])}, ValueError, r"labels holds numbers \(first: 0.5\)",
                "labels expected", "make them strings"),
    "no column": ({"labels": "markers"}, KeyError, "'markers' is not a column of adata.var", "Did you mean",
                  "'marker'"),
    "two columns": ({"labels": pd.DataFrame({"gene_symbol": ["A"], "x": ["a"], "y": ["b"]})}, ValueError,
                    r"a table with 2 columns beside gene names \('x', 'y'\)", "one column of labels expected",
                    "Pass that column"),
    "genes by label": ({"labels": {"a": ["gene_0"], "b": ["gene_1"]}}, TypeError, "labels gives 'a' a list",
                       "one label a gene expected", "Turn it round"),
    "a list": ({"labels": ["gene_0"]}, TypeError, "labels is a list", "expected", "Pass one of those"),
    "one fold": ({"n_folds": 1}, ValueError, "n_folds is 1", "at least 2 expected", "Leave it out"),
    "half a fold": ({"n_folds": 2.5}, ValueError, "n_folds is 2.5", "a whole number .* expected", "Leave it out"),
    "cells in words": ({"max_cells": "all"}, ValueError, "max_cells is 'all'", "number .* expected", "Leave it out"),
    "no loss": ({"loss": None}, TypeError, "loss", "got None", "loss='ce'"),
    "the same column": ({"labels": "marker", "key_added": "marker"}, ValueError,
                        "labels and key_added='marker' are one column", "different ones expected", "another key_added"),
    "no name": ({"key_added": None}, TypeError, "key_added", "None", "Leave it out"),
    "no cells": ({"max_cells": 0}, ValueError, "max_cells is 0", "at least 1 expected", "Leave it out"),
    "validation": ({"validation": "split"}, ValueError, "validation is 'split'", "share .* of the training genes",
                   "Leave it out"),
    "an option": ({"upsample": True}, TypeError, "classify_genes has no option 'upsample'", "max_cells", "Leave it"),
    "a misspelt option": ({"epoch": 1}, TypeError, "'epoch'", "max_cells", "Did you mean 'epochs'"),
    "a loss": ({"loss": "mse"}, ValueError, "loss", "'ce'.*'mse'", "loss='ce'"),
    "adapters of what stays": ({"freeze": "encoder", "lora": 2}, TypeError, "lora= adapts the encoder",
                               "one of them expected", "Leave one out"),
    "what heads on cells read": ({"config": TrainConfig(head_reads="both")}, TypeError, "config has head_reads='both'",
                                 "settings that heads on genes have expected", "Leave it out"),
    "smooth labels": ({"config": TrainConfig(label_smoothing=0.1)}, TypeError, "config has label_smoothing=0.1",
                      "settings that heads on genes have expected", "Leave it out"),
    "blocks": ({"freeze": 9}, ValueError, "freeze", "0 to 2", "got 9"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_input_says_what_was_seen_what_was_expected_and_what_to_do(adata, tiny, tmp_path, case):
    options, error, seen, expected, advice = case
    adata.var["marker"] = "x"
    before = adata.copy()
    with pytest.raises(error, match=rf"(?s){seen}.*{expected}.*{advice}"):
        classify_genes(adata, tiny, **{"labels": series(TEN), "run_dir": tmp_path / "run", **options})
    # nothing is written
    assert list(adata.var) == list(before.var)
    assert "scllm" not in adata.uns
    assert not (tmp_path / "run").exists()


def test_genes_that_the_model_does_not_know_are_named(adata, tiny):
    known = models.build("scgpt", vocab=[f"gene_{i}" for i in range(20)], n_layers=1, n_heads=2, d_model=8, d_hidden=8)
    unknown = series(TEN, [f"gene_{i}" for i in range(20, 30)])
    message = (
        r"none of the 10 labelled genes of the data is in the model's vocabulary \(first: 'gene_20'\), .* expected"
    )
    with pytest.raises(ValueError, match=rf"{message}\. Look at pp.match_genes"):
        classify_genes(adata, known, labels=unknown)


def test_a_model_without_genes_is_refused(adata, tiny):
    with pytest.raises(
        ValueError, match=r"patches model has no states of genes, .* expected\. Pass a model of another"
    ):
        classify_genes(adata, without_genes(tiny), labels=series(TEN))


def test_duplicated_genes_of_the_data_are_refused(adata, tiny):
    adata.var_names = ["gene_0", *adata.var_names[:-1]]
    with pytest.raises(ValueError, match=r"duplicated \(first: 'gene_0'\), every gene must be there once\. Call"):
        classify_genes(adata, tiny, labels=series(TEN))


def test_two_names_of_one_gene_need_one_label(adata, tiny):
    adata.var_names = [f"ENSG{i // 2:011d}.{i % 2}" for i in range(40)]
    model = models.build(
        "scgpt", vocab=[f"ENSG{i:011d}" for i in range(20)], n_layers=1, n_heads=2, d_model=8, d_hidden=8
    )
    adata.var["label"] = TEN * 4
    with pytest.raises(
        ValueError, match=r"'ENSG00000000000\.0' and 'ENSG00000000000\.1' are one gene .* expected\. Drop"
    ):
        classify_genes(adata, model, labels="label")


def test_missing_labels_are_left_out_with_a_warning(adata, tiny):
    some = series(["a"] * 10 + ["b"] * 10)
    some.iloc[[3, 15]] = np.nan
    with pytest.warns(
        UserWarning, match=r"2 of 20 genes have no label \(first: 'gene_3'\) and are left out, .* expected"
    ):
        classify_genes(adata, tiny, labels=some, freeze="encoder", n_folds=3, baseline=False)
    assert adata.var["gene_label"].notna().sum() == 18
