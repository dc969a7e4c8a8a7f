"""Whatever columns and keys are called, what verbs write can be written into files and read back."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scllm import get, models, pl, pp, tl
from scllm.tl import TrainConfig, classify, cross_validate, finetune, transfer_labels

ONE = {"config": TrainConfig(steps=1), "batch_size": 8}
FORMATS = ["h5ad", "zarr2", "zarr3"]


def read_back(adata, format, folder):
    path = folder / f"data.{format}"
    if format == "h5ad":
        adata.write_h5ad(path)
        return ad.read_h5ad(path)
    with ad.settings.override(zarr_write_format=int(format[-1])):
        adata.write_zarr(path)
    return ad.read_zarr(path)


def check_same(found, expected, where="") -> None:
    """Compare two tables, matrices, arrays or dicts of such."""
    match expected:
        case dict():
            assert set(found) == set(expected), where
            for name, value in expected.items():
                check_same(found[name], value, f"{where}/{name}")
        case pd.DataFrame():
            # files keep no RangeIndex; an empty column of text has no type there
            found, expected = found.reset_index(drop=True), expected.reset_index(drop=True)
            pd.testing.assert_frame_equal(found, expected, check_dtype=False, check_categorical=False, obj=where)
        case _ if sparse.issparse(expected):
            assert (found != expected).nnz == 0, where
        case _:
            np.testing.assert_array_equal(np.asarray(found), np.asarray(expected), err_msg=where)


def use_all_verbs(adata, tiny, key) -> None:
    """Call each verb with `key` wherever it takes a name."""
    adata.obs[key], adata.var[key] = adata.obs["cell_type"], np.arange(40) % 2 == 0
    for verb in (pp.bin_expression, pp.gene_medians, pp.split):
        verb(adata, key_added=key if verb is not pp.split else f"{key} split")
    pp.rank_expression(adata, key_added=f"{key} ranks")
    pp.tokenize(adata, key_added=key)
    assert get.tokens(adata, key=key)[0].shape[0] == 60
    tuned = finetune(adata, tiny, key=[key, "batch"], group_key=f"{key.replace('/', '_')} split", validation=0.5, **ONE)
    classify(adata, tuned)
    classify(adata, tuned, key_added=f"{key} label")
    tl.embed(adata, tuned, key_added=key)
    tl.embed_genes(adata, tuned, groupby=key, key_added=key)
    tl.reconstruct(adata, tuned, mask_ratio=0.5, key_added=f"{key} again")
    cross_validate(adata, tiny, key=key, n_folds=2, **ONE)
    transfer_labels(adata, adata.copy(), key=key, use_rep=key.replace("/", "_"), n_neighbors=3)
    adata.var["kind"] = np.arange(40) % 2 == 0
    tl.classify_genes(adata, tiny, labels="kind", n_folds=2, freeze="encoder", key_added=f"{key} genes")
    if key == "a/b":  # takes longest
        tl.perplexity(adata, models.build("gpt2", vocab=adata.var_names, size="tiny"), key_added=f"{key} perplexity")


@pytest.mark.filterwarnings("ignore:zarr v3 autosharding", "ignore:Consolidated metadata")
@pytest.mark.parametrize("key", ["a/b", "a b", "é", "0"])
def test_results_of_every_verb_survive_files_whatever_keys_are_called(adata, tiny, tmp_path, key):
    use_all_verbs(adata, tiny, key)
    safe = key.replace("/", "_")
    assert {f"{safe}_cv", f"{safe}_transferred", f"scllm_label_{safe}", f"{safe} label_{safe}"} <= set(adata.obs)
    pl.roc(adata, truth=key, show=False)
    if key != safe:  # columns of the caller, which files take less and less
        del adata.obs[key], adata.var[key]
    names = [*adata.obs, *adata.var, *adata.obsm, *adata.varm, *adata.layers]
    assert not [name for name in names if "/" in name]
    for format in FORMATS:
        back = read_back(adata, format, tmp_path)
        for slot in ("obs", "var"):
            check_same(getattr(back, slot), getattr(adata, slot), slot)
        for slot in ("obsm", "varm", "layers", "uns"):
            check_same(dict(getattr(back, slot)), dict(getattr(adata, slot)), slot)


def test_a_key_that_is_taken_is_an_error_and_the_same_name_again_is_none(adata, tiny):
    for _ in range(2):
        pp.bin_expression(adata, key_added="T/NK")
    with pytest.raises(ValueError, match=r"layers\['T_NK'\] .* results of 'T_NK'.* holds the results of 'T/NK'"):
        pp.rank_expression(adata, key_added="T_NK")
    adata.layers["B_NK"] = adata.X.copy()
    with pytest.raises(ValueError, match=r"layers\['B_NK'\] .* holds other values"):
        tl.reconstruct(adata, tiny, key_added="B/NK")
    adata.obs["T/NK"], adata.obs["T_NK"] = adata.obs["cell_type"], adata.obs["cell_type"]
    for _ in range(2):
        cross_validate(adata, tiny, key="T/NK", n_folds=2, baseline=False, **ONE)
    with pytest.raises(ValueError, match=r"obs\['T_NK_cv'\] .* holds the results of 'T/NK_cv'"):
        cross_validate(adata, tiny, key="T_NK", n_folds=2, baseline=False, **ONE)
    with pytest.raises(ValueError, match=r"\['T/NK', 'T_NK'\]"):
        finetune(adata, tiny, key=["T/NK", "T_NK"], **ONE)


def test_a_key_taken_in_a_file_is_still_taken(adata, tmp_path):
    pp.bin_expression(adata, key_added="T/NK")
    back = read_back(adata, "h5ad", tmp_path)
    pp.bin_expression(back, key_added="T/NK")
    with pytest.raises(ValueError, match="holds the results of 'T/NK'"):
        pp.bin_expression(back, key_added="T_NK")
    del back.layers["T_NK"]
    pp.bin_expression(back, key_added="T_NK")


@pytest.mark.parametrize("key", ["", ".", ".."])
def test_names_that_no_file_takes_are_errors(adata, key):
    with pytest.raises(ValueError, match=f"key_added to be a name, got '{key}'"):
        pp.bin_expression(adata, key_added=key)


@pytest.mark.parametrize("name", [0, ("a", "b"), 1.5])
def test_columns_whose_names_are_no_strings_are_left_alone(adata, tiny, name):
    adata.obs[name] = 1
    tuned = finetune(adata, tiny, key="cell_type", **ONE)
    classify(adata, tuned)
    assert name in adata.obs.columns
