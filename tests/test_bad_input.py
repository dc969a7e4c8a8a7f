"""Bad input: what was seen, what was expected, what to do; and nothing is written."""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from messages import naming
from scipy import sparse

import scllm
from scllm import models, pp, tl
from scllm.models import CellModel

SIZES = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_hidden": 8}


@cache
def small(style: str = "continuous", genes: tuple[str, ...] = tuple(f"gene_{i}" for i in range(40))) -> CellModel:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return scllm.models.build("scgpt", vocab=genes, value_style=style, **SIZES).eval()


@dataclass(frozen=True)
class Case:
    """How the input is spoilt, what is called, and the three parts of the message."""

    spoil: Callable[[AnnData, Path], object]
    call: Callable[[AnnData, Path], object]
    seen: str
    expected: str
    advice: str
    error: type[Exception] = ValueError


def embed(adata: AnnData, folder: Path) -> object:
    return scllm.tl.embed(adata, small())


def set_value(value: float) -> Callable[[AnnData, Path], None]:
    def spoil(adata: AnnData, folder: Path) -> None:
        dense = adata.X.toarray()
        dense[3, 7] = value
        adata.X = sparse.csr_matrix(dense)

    return spoil


def take_logarithm(adata: AnnData, folder: Path) -> None:
    adata.layers["other"], adata.layers["counts"] = adata.X.multiply(0.37).tocsr(), adata.X
    adata.X = adata.X.log1p()


def rename(pattern: str, start: int = 0) -> Callable[[AnnData, Path], None]:
    def spoil(adata: AnnData, folder: Path) -> None:
        adata.var_names = [*adata.var_names[:start], *(pattern.format(i) for i in range(start, 40))]

    return spoil


def label(key: str, values: object) -> Callable[[AnnData, Path], None]:
    return lambda adata, folder: adata.obs.__setitem__(key, values)


def twice(key: str) -> Callable[[AnnData, Path], None]:
    def spoil(adata: AnnData, folder: Path) -> None:
        adata.obs = pd.concat([adata.obs, adata.obs[[key]]], axis=1)

    return spoil


def finetune(key: str) -> Callable[[AnnData, Path], object]:
    return lambda adata, folder: scllm.tl.finetune(adata, small(), key=key, run_dir=folder / "run")


def pretrain(**options: object) -> Callable[[AnnData, Path], object]:
    options = {"size": "tiny", "epochs": 1} | options
    return lambda adata, folder: scllm.tl.pretrain(adata, run_dir=folder / "run", **options)


def train_otherwise(adata: AnnData, folder: Path) -> None:
    pretrain(lr=2e-3)(adata.copy(), folder)


def save_folder(adata: AnnData, folder: Path) -> None:
    small().save(folder / "model", format="scgpt")
    small().path = None


def truncate(adata: AnnData, folder: Path) -> None:
    save_folder(adata, folder)
    path = folder / "model" / "best_model.pt"
    path.write_bytes(path.read_bytes()[:1000])


class Malicious:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("executed"),)


def poison(adata: AnnData, folder: Path) -> None:
    save_folder(adata, folder)
    (folder / "model" / "best_model.pt").write_bytes(pickle.dumps({"weight": Malicious()}, protocol=2))


def poison_zip(adata: AnnData, folder: Path) -> None:
    save_folder(adata, folder)
    torch.save({"weight": Malicious()}, folder / "model" / "best_model.pt")


def poison_run(adata: AnnData, folder: Path) -> None:
    train_otherwise(adata, folder)
    (folder / "run" / "done").unlink()
    for checkpoint in (folder / "run" / "checkpoints").iterdir():
        torch.save({"model": Malicious()}, checkpoint)


def load(adata: AnnData, folder: Path) -> object:
    return scllm.models.load(folder / "model", family="scgpt")


NOT_FINITE = {
    "expected": "Expected non-negative finite values",
    "advice": "Pass a layer that holds counts with `layer=`",
}
LOGGED = {
    "seen": r"X holds non-integers \(first: \S+, gene 'gene_\d+' in cell 'cell_0'\) and looks log",
    "expected": "Expected raw counts",
}
DAMAGED = {
    "seen": r"best_model\.pt cannot be read", "expected": "plain tensors",
    "advice": "checkpoint",
}  # fmt: skip

CASES = {
    "negative": Case(
        set_value(-1), embed, r"X holds negative values \(first: -1, gene 'gene_7' in cell 'cell_3'\)", **NOT_FINITE
    ),
    "NaN": Case(
        set_value(np.nan), embed, r"non-finite values \(first: nan, gene 'gene_7' in cell 'cell_3'\)", **NOT_FINITE
    ),
    "infinite": Case(
        set_value(np.inf), lambda adata, folder: scllm.pp.bin_expression(adata),
        r"non-finite values \(first: inf, gene 'gene_7' in cell 'cell_3'\)", **NOT_FINITE,
    ),
    "logged, scaling style": Case(
        take_logarithm, lambda adata, folder: scllm.tl.embed(adata, small("scaling")),
        advice="Layer 'counts' holds counts: pass layer='counts'", **LOGGED,
    ),
    "logged, recipe": Case(
        take_logarithm, lambda adata, folder: scllm.pp.recipe_scgpt(adata),
        advice=r"Layer 'counts' holds counts: adata\.X = adata\.layers\['counts'\]", **LOGGED,
    ),
    "logged, down-sampling": Case(
        take_logarithm, pretrain(config=scllm.tl.TrainConfig(downsample=0.3)), advice="pass layer='counts'", **LOGGED
    ),
    "all zero": Case(
        lambda adata, folder: setattr(adata, "X", adata.X * 0), embed,
        "X holds nothing but zeros", "Expected counts", "Pass the layer that holds counts",
    ),
    "duplicated names": Case(
        rename("gene_7", 38), embed, naming(1, "first: 'gene_7'"), "unique gene names",
        r"Call adata\.var_names_make_unique\(\)",
    ),
    "duplicated names, pretraining": Case(
        rename("gene_7", 38), pretrain(), naming(1, "first: 'gene_7'"), "unique gene names",
        r"Call adata\.var_names_make_unique\(\)",
    ),
    "no known gene": Case(
        rename("other_{}"), embed, r"Only 0 of 40 genes \(0 %\)", "at least 30 % are needed",
        r"Check species and gene names\.$",  # accepting none at all is no way out
    ),
    "genes in capitals": Case(
        rename("GENE_{}"), embed, r"Only 0 of 40 genes \(0 %\)",
        "40 names differ only in case", r"adata\.var_names\.str\.upper\(\) for human",
    ),
    "few known genes": Case(
        rename("other_{}", 8), embed, r"Only 8 of 40 genes \(20 %\)", "at least 30 % are needed",
        "accept it with a lower min_coverage=",
    ),
    "Ensembl ids": Case(
        rename("ENSG{:011d}"), embed, r"var_names look like Ensembl ids \('ENSG00000000000'\)",
        r"vocabulary holds symbols \('gene_0'\)", "Pass the column of var that holds symbols with `gene_key=`",
    ),
    "one bin": Case(
        lambda adata, folder: None, lambda adata, folder: scllm.pp.bin_expression(adata, n_bins=1),
        naming("n_bins", "got 1"), "at least 2", "n_bins=51",
    ),
    "missing column": Case(
        lambda adata, folder: None, finetune("celltype"), "'celltype' is not", "a column of adata.obs",
        "Did you mean 'cell_type'", KeyError,
    ),
    "one class": Case(
        label("one", "x"), finetune("one"), r"1 \('x'\)", r"at least 2 classes in obs\['one'\]",
        "Pass a column with several labels",
    ),
    "labels written alike": Case(
        label("mixed", pd.Categorical([1, "1", "a"] * 20, categories=[1, "1", "a"])), finetune("mixed"),
        r"1 \(int\) and '1' \(str\)", r"obs\['mixed'\]",
        r"adata\.obs\['mixed'\] = adata\.obs\['mixed'\]\.astype\(object\)\.map\(str",
    ),
    "integer labels": Case(
        label("n", np.arange(60) % 3 + 5), finetune("n"), naming("obs['n']", "integers", "first: 5"),
        "labels or float values", r"\.astype\('category'\)",
    ),
    "numbers as objects": Case(
        label("n", pd.Series([*range(5), None] * 10, dtype=object).to_numpy()), finetune("n"),
        naming("obs['n']", "numbers as objects", "first: 0"), "labels or float values",
        r"\.astype\('category'\)",
    ),
    "two columns of one name": Case(
        twice("cell_type"), finetune("cell_type"), r"got 2\b", r"one column 'cell_type' in adata\.obs",
        "Rename or drop",
    ),
    "too many GPUs": Case(
        lambda adata, folder: None, pretrain(n_gpus=8), naming("n_gpus", 8), rf"at most {torch.cuda.device_count()}\b",
        "device='cpu'|n_gpus=",
    ),
    "a list of GPUs": Case(
        lambda adata, folder: None, pretrain(n_gpus=[0, 1]), naming("n_gpus", "[0, 1]"), "whole number", "Leave it out",
        TypeError,
    ),
    "other settings": Case(
        train_otherwise, pretrain(lr=1e-3), naming("train.lr was 0.002, now 0.001"), "/run'", "another run_dir",
    ),
    "truncated": Case(truncate, load, **DAMAGED),
    "malicious": Case(poison, load, **DAMAGED),
    "malicious archive": Case(poison_zip, load, **DAMAGED),
    "malicious run": Case(
        poison_run, pretrain(lr=2e-3), **{**DAMAGED, "seen": r"step-\d+\.pt cannot be read"}
    ),
}  # fmt: skip


def contents(folder: Path) -> dict[str, str]:
    """Every file but locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
@pytest.mark.parametrize("name", CASES)
def test_a_message_says_what_was_seen_expected_and_to_do_and_nothing_is_written(adata, tmp_path, monkeypatch, name):
    if name == "too many GPUs" and torch.cuda.device_count() >= 8:
        pytest.skip("there are eight GPUs")
    monkeypatch.chdir(tmp_path)
    case = CASES[name]
    case.spoil(adata, tmp_path)
    before, files = adata.copy(), contents(tmp_path)
    with pytest.raises(case.error) as raised:
        case.call(adata, tmp_path)
    message = str(raised.value)
    for part in (case.seen, case.expected, case.advice):
        assert re.search(part, message), f"{part!r} is not in {message!r}"
    assert contents(tmp_path) == files
    np.testing.assert_array_equal(adata.X.toarray(), before.X.toarray())
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    pd.testing.assert_frame_equal(adata.var, before.var)
    for where in ("uns", "obsm", "varm", "layers"):
        assert list(getattr(adata, where)) == list(getattr(before, where))


def test_other_layers_are_not_spoken_of_where_nothing_is_wrong(adata):
    embed(adata, Path())
    expected = adata.obsm["X_scllm"].copy()
    adata.layers["odd"] = adata.X * 37.7  # not counts, and too large to be logged
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embed(adata, Path())
    np.testing.assert_array_equal(adata.obsm["X_scllm"], expected)


def test_a_cell_without_a_known_gene_is_kept_as_cls_alone(adata):
    rename("other_{}", 20)(adata, Path())
    unknown = np.arange(40) >= 20
    empty = np.isin(np.arange(60), [4, 9])
    adata.X = sparse.csr_matrix(adata.X.multiply(~empty[:, None] | unknown))
    with pytest.warns(UserWarning, match=naming("2 of 60 cells", "<cls>")):
        embed(adata, Path())
    embedding = adata.obsm["X_scllm"]
    assert np.isfinite(embedding).all()
    np.testing.assert_allclose(embedding[4], embedding[9], atol=1e-6)
    with torch.no_grad():
        cls = scllm.models.base.Batch.from_tokens(
            scllm.data.tokens.Tokens(np.array([0, 1]), np.array([small().vocab.cls_id]), np.zeros(1))
        )
        np.testing.assert_allclose(embedding[4], small().embed(cls)[0], atol=1e-6)


def test_a_model_of_few_genes_reads_data_of_many():
    rng = np.random.default_rng(0)
    counts = sparse.random(12, 20_000, 0.05, format="csr", rng=rng, dtype=np.float32)
    counts.data = rng.integers(1, 9, counts.nnz).astype(np.float32)
    adata = AnnData(counts, var=pd.DataFrame(index=[f"gene_{i}" for i in range(20_000)]))
    chosen = rng.permutation(20_000)[:1200]
    model = small(genes=tuple(f"gene_{i}" for i in chosen))
    scllm.tl.embed(adata, model)
    part = adata[:, chosen].copy()
    scllm.tl.embed(part, model)
    np.testing.assert_allclose(part.obsm["X_scllm"], adata.obsm["X_scllm"], atol=1e-5)


FORMS = {
    "csr_array": sparse.csr_array,
    "csc": sparse.csc_matrix,
    "dense": lambda x: x.toarray(),
    "fortran": lambda x: np.asfortranarray(x.toarray()),
    "float64": lambda x: x.astype(np.float64),
    "int32": lambda x: x.astype(np.int32),
    "uint16": lambda x: x.astype(np.uint16),
    "int64 indices": lambda x: sparse.csr_matrix((x.data, x.indices.astype(np.int64), x.indptr.astype(np.int64))),
}  # fmt: skip


@pytest.mark.parametrize("form", [*FORMS, "backed", "view", "backed view", "view of all genes turned round"])
@pytest.mark.parametrize("style", ["continuous", "scaling"])
def test_every_form_of_the_matrix_gives_the_same_embedding(adata, tmp_path, form, style):
    model, mask = small(style), np.arange(60) % 3 == 0
    scllm.tl.embed(adata, model)
    expected = adata.obsm["X_scllm"]
    if form in FORMS:
        data = AnnData(FORMS[form](adata.X), var=adata.var)
    elif "backed" in form:
        adata.write_h5ad(tmp_path / "a.h5ad")
        data = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    else:
        data = adata[:, ::-1] if "turned" in form else adata
    if form.endswith("view"):
        data, expected = data[mask], expected[mask]
    if form == "backed view":
        found = scllm.tl.embed(data.to_memory(), model, copy=True)
    elif data.is_view:
        found = scllm.tl.embed(data, model, copy=True)
    else:
        found = data
        scllm.tl.embed(data, model)
    np.testing.assert_allclose(found.obsm["X_scllm"], expected, atol=1e-5)


def test_a_view_that_a_verb_writes_to_becomes_data_of_its_own(adata):
    part = adata[:20]
    with pytest.warns(ad.ImplicitModificationWarning):
        embed(part, Path())
    assert part.obsm["X_scllm"].shape == (20, 8)
    assert "X_scllm" not in adata.obsm
    assert not adata.uns


@pytest.mark.parametrize(
    "verb", [tl.classify, tl.embed_genes, tl.reconstruct, pp.bin_expression, pp.tokenize, pp.split]
)
def test_a_path_where_only_an_anndata_will_do(verb):
    with pytest.raises(TypeError, match=naming("adata", "AnnData", "'cells.h5ad'", "anndata.read_h5ad")):
        verb("cells.h5ad")


def test_a_backed_anndata_that_cannot_be_written_is_an_error_before_anything_is_computed(adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    model = models.build("scgpt", vocab=adata.var_names, size="tiny")
    with pytest.raises(ValueError, match=naming("copy=True", "backed", "adata.to_memory()")):
        tl.embed(backed, model, copy=True)
    with pytest.raises(ValueError, match=naming("view", "backed", "adata.to_memory()")):
        tl.embed(backed[:10], model)
    backed.file.close()
