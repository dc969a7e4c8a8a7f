"""Invalid input of classify_genes and its messages."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from messages import naming

from scllm import models
from scllm.models import CellModel, scgpt
from scllm.tl import TrainConfig, classify_genes


class NoGenes(scgpt.Model):
    """A model of a family whose tokens are not genes."""

    reads_genes = False


def without_genes(model: CellModel) -> CellModel:
    changed = NoGenes(model.config, model.vocab, model.encoder)
    changed.family = "patches"
    return changed


def series(values, names=None) -> pd.Series:
    return pd.Series(values, names if names is not None else [f"gene_{i}" for i in range(len(values))])


TEN = ["a", "b"] * 5
# options, the error, and the values that its message names
BAD = {
    "one class": ({"labels": series(["a"] * 10)}, ValueError, "at least 2 classes", "got 1 ('a')"),
    "one class in the data": ({"labels": series([*["a"] * 10, "b"], [*[f"gene_{i}" for i in range(10)], "far"])},
                              ValueError, "at least 2 classes", "got 1 ('a')"),
    "no gene in the data": ({"labels": series(TEN, [f"far_{i}" for i in range(10)])}, ValueError,
                            "labels", 10, "'far_0'", "'gene_0'", "'gene_symbol'", "'ensembl_id'"),
    "fewer genes than folds": ({"labels": series(["a"] * 9 + ["b"] * 3)}, ValueError, "n_folds=5", "got 3", "'b'"),
    "labelled twice": ({"labels": series(TEN, ["gene_0", *[f"gene_{i}" for i in range(9)]])}, ValueError,
                       "one label", 1, "'gene_0': 'a', 'b'"),
    "no label": ({"labels": series([None] * 5)}, ValueError, "labels", "at least 2 classes", "no label"),
    "numbers": ({"labels": series([0.5, 1.5, 2.5])}, ValueError, "labels", "numbers", "0.5", ".astype(str)"),
    "no column": ({"labels": "markers"}, KeyError, "'markers'", "adata.var", "Did you mean 'marker'"),
    "two columns": ({"labels": pd.DataFrame({"gene_symbol": ["A"], "x": ["a"], "y": ["b"]})}, ValueError,
                    "table", 2, "('x', 'y')", "labels=table['...']"),
    "genes by label": ({"labels": {"a": ["gene_0"], "b": ["gene_1"]}}, TypeError, "labels", "list", "'a'",
                       "labels.items()"),
    "a list": ({"labels": ["gene_0"]}, TypeError, "labels", "list", "Series", "adata.var"),
    "one fold": ({"n_folds": 1}, ValueError, "n_folds", "at least 2", "got 1"),
    "half a fold": ({"n_folds": 2.5}, ValueError, "n_folds", "whole number", "2.5"),
    "cells in words": ({"max_cells": "all"}, ValueError, "max_cells", "whole number", "'all'"),
    "no loss": ({"loss": None}, TypeError, "loss", "got None", "loss='ce'"),
    "the same column": ({"labels": "marker", "key_added": "marker"}, ValueError,
                        "labels='marker'", "key_added='marker'"),
    "no name": ({"key_added": None}, TypeError, "key_added", None),
    "no cells": ({"max_cells": 0}, ValueError, "max_cells", "at least 1", "got 0"),
    "validation": ({"validation": "split"}, ValueError, "validation", "'split'", "training genes"),
    "an option": ({"upsample": True}, TypeError, "classify_genes", "'upsample'", "max_cells"),
    "a misspelt option": ({"epoch": 1}, TypeError, "'epoch'", "max_cells", "Did you mean 'epochs'"),
    "a loss": ({"loss": "mse"}, ValueError, "loss", "'ce'", "'mse'"),
    "adapters of what stays": ({"freeze": "encoder", "lora": 2}, TypeError, "lora=", "freeze='encoder'"),
    "what heads on cells read": ({"config": TrainConfig(head_reads="both")}, TypeError, "config", "head_reads='both'"),
    "smooth labels": ({"config": TrainConfig(label_smoothing=0.1)}, TypeError, "config", "label_smoothing=0.1"),
    "blocks": ({"freeze": 9}, ValueError, "freeze", "0 to 2", "got 9"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_input_is_named_and_nothing_is_written(adata, tiny, tmp_path, case):
    options, error, *values = case
    adata.var["marker"] = "x"
    before = adata.copy()
    with pytest.raises(error, match=naming(*values)):
        classify_genes(adata, tiny, **{"labels": series(TEN), "run_dir": tmp_path / "run", **options})
    assert list(adata.var) == list(before.var)
    assert "scllm" not in adata.uns
    assert not (tmp_path / "run").exists()


def test_genes_outside_the_vocabulary_are_named(adata, tiny):
    known = models.build("scgpt", vocab=[f"gene_{i}" for i in range(20)], n_layers=1, n_heads=2, d_model=8, d_hidden=8)
    unknown = series(TEN, [f"gene_{i}" for i in range(20, 30)])
    with pytest.raises(ValueError, match=naming("vocabulary", 10, "'gene_20'", "pp.match_genes(adata, model)")):
        classify_genes(adata, known, labels=unknown)


def test_a_model_without_genes_is_refused(adata, tiny):
    with pytest.raises(ValueError, match=naming("patches", "genes", "'scgpt'")):
        classify_genes(adata, without_genes(tiny), labels=series(TEN))


def test_duplicated_genes_of_the_data_are_refused(adata, tiny):
    adata.var_names = ["gene_0", *adata.var_names[:-1]]
    with pytest.raises(ValueError, match=naming("duplicated", "first: 'gene_0'")):
        classify_genes(adata, tiny, labels=series(TEN))


def test_two_names_of_one_gene_need_one_label(adata, tiny):
    adata.var_names = [f"ENSG{i // 2:011d}.{i % 2}" for i in range(40)]
    model = models.build(
        "scgpt", vocab=[f"ENSG{i:011d}" for i in range(20)], n_layers=1, n_heads=2, d_model=8, d_hidden=8
    )
    adata.var["label"] = TEN * 4
    with pytest.raises(ValueError, match=naming("'a' for 'ENSG00000000000.0'", "'b' for 'ENSG00000000000.1'")):
        classify_genes(adata, model, labels="label")


def test_genes_without_a_label_are_ignored_with_a_warning(adata, tiny):
    some = series(["a"] * 10 + ["b"] * 10)
    some.iloc[[3, 15]] = np.nan
    with pytest.warns(UserWarning, match=naming("2 of 20 genes", "'gene_3'")):
        classify_genes(adata, tiny, labels=some, freeze="encoder", n_folds=3, baseline=False)
    assert adata.var["gene_label"].notna().sum() == 18
