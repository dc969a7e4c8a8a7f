"""Verbs give the same result wherever their data are."""

from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path

import anndata
import numpy as np
import pytest
import zarr
from anndata import AnnData
from scipy import sparse

from scllm.data.source import open_source
from scllm.tl import embed, finetune, pretrain

pytest.importorskip("tiledbsoma", reason="needs the extra 'census'")
from somas import write_soma

KINDS = [
    *(
        "memory",
        "memory csc",
        "h5ad",
        "h5ad csc",
        "zarr 2",
        "zarr 3",
        "zarr 3 sharded",
        "zarr 3 csc",
        "soma",
        "annbatch",
    ),
    *("grouped", "list", "folder"),
]


def write_zarr(adata: AnnData, path: Path, *, version: int = 3, sharded: bool = False) -> Path:
    with anndata.settings.override(zarr_write_format=version, auto_shard_zarr_v3=sharded if version == 3 else None):
        with warnings.catch_warnings(action="ignore"):  # what zarr 3 says about its own format
            adata.write_zarr(path)
    return path


def write_annbatch(adata: AnnData, path: Path, kind: str = "preshuffled", n: int = 12) -> Path:
    """The layout of a collection of annbatch: data sets that are AnnData, in more groups than have one digit."""
    root = zarr.open_group(path, mode="w", zarr_format=3)
    cuts = np.linspace(0, adata.n_obs, n + 1).astype(int)
    for i, (start, stop) in enumerate(pairwise(cuts)):
        write_zarr(adata[start:stop].copy(), path / f"dataset_{i}", sharded=True)
    if kind == "grouped":
        with anndata.settings.override(zarr_write_format=3, auto_shard_zarr_v3=False):
            anndata.io.write_elem(root, "group_index", adata.obs.iloc[:3])
    root.attrs.update({"encoding-type": f"annbatch-{kind}", "encoding-version": "0.1.0"})
    return path


def stored(adata: AnnData, kind: str, folder: Path):
    """Put cells away; what comes back is passed to a verb."""
    csc = adata.copy()
    csc.X = sparse.csc_matrix(adata.X)
    columns = list(adata.obs)
    match kind:
        case "memory":
            return adata
        case "memory csc":
            return csc
        case "h5ad" | "h5ad csc":
            (adata if kind == "h5ad" else csc).write_h5ad(folder / "a.h5ad", compression="gzip")
            return folder / "a.h5ad"
        case "soma":
            return write_soma(adata, folder / "soma", columns=columns)
        case "annbatch" | "grouped":
            return write_annbatch(adata, folder / "a.zarr", "grouped" if kind == "grouped" else "preshuffled")
        case "list" | "folder":
            adata[:20].copy().write_h5ad(folder / "a.h5ad")
            write_zarr(adata[20:35].copy(), folder / "b.zarr", sharded=True)
            write_soma(adata[35:50].copy(), folder / "c", columns=columns)
            write_annbatch(adata[50:].copy(), folder / "d.zarr", n=2)
            return folder if kind == "folder" else [folder / name for name in ("a.h5ad", "b.zarr", "c", "d.zarr")]
    *_, version = kind.removesuffix(" sharded").removesuffix(" csc").split()
    form = csc if kind.endswith("csc") else adata
    return write_zarr(form, folder / "a.zarr", version=int(version), sharded=kind.endswith("sharded"))


@pytest.mark.parametrize("kind", KINDS)
def test_cells_are_the_same_wherever_they_are(kind, adata, tiny, tmp_path):
    data = stored(adata, kind, tmp_path)
    source = open_source(data)
    assert list(source.obs_names) == list(adata.obs_names)
    assert list(source.genes) == list(adata.var_names)
    assert list(source.obs(["cell_type"])["cell_type"]) == list(adata.obs["cell_type"])
    np.testing.assert_array_equal(source.read(slice(None)).toarray(), adata.X.toarray())
    expected = adata.copy()
    embed(expected, tiny, batch_size=13)
    if isinstance(data, AnnData):
        embed(data, tiny, batch_size=13)
        found = data.obsm["X_scllm"]
    else:
        found = embed(data, tiny, batch_size=13)
    np.testing.assert_array_equal(found, expected.obsm["X_scllm"])


def divided(adata: AnnData, folder: Path, *, soma: bool) -> list[Path]:
    """Three files of different genes, the last one a SOMA or an h5ad."""
    adata[:20, :30].copy().write_h5ad(folder / "a.h5ad")
    write_zarr(adata[20:40, 5:].copy(), folder / "b.zarr")
    last = adata[40:, ::-1][:, :36].copy()
    if soma:
        write_soma(last, folder / "c", columns=list(adata.obs))
    else:
        last.write_h5ad(folder / "c.h5ad")
    return [folder / "a.h5ad", folder / "b.zarr", folder / ("c" if soma else "c.h5ad")]


def test_a_list_of_all_kinds_with_different_genes_embeds_as_its_parts(adata, tiny, tmp_path):
    parts = divided(adata, tmp_path, soma=True)
    np.testing.assert_array_equal(embed(parts, tiny), np.concatenate([embed(part, tiny) for part in parts]))


@pytest.mark.parametrize("verb", [pretrain, finetune])
def test_training_on_a_list_of_all_kinds_is_that_on_h5ad(verb, adata, tiny, tmp_path, monkeypatch):
    options = {"epochs": 2, "batch_size": 16, "validation": 0.2, "device": "cpu"}
    options |= {"model": tiny} if verb is pretrain else {"model": tiny, "key": "cell_type"}
    losses = []
    for soma in (False, True):
        folder = tmp_path / f"{soma}"
        folder.mkdir()
        divided(adata, folder, soma=soma)
        monkeypatch.chdir(folder)  # relative paths
        model = verb(["a.h5ad", "b.zarr", "c" if soma else "c.h5ad"], run_dir=folder / "run", **options)
        losses.append(model.history["loss"].to_numpy())
    np.testing.assert_array_equal(losses[0], losses[1])


@pytest.mark.slow
def test_several_processes_open_all_kinds_again(adata, tiny, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    divided(adata, folder, soma=True)
    monkeypatch.chdir(folder)
    model = pretrain(
        ["a.h5ad", "b.zarr", "c"], tiny, epochs=1, batch_size=16, n_procs=2, device="cpu", run_dir=tmp_path / "run"
    )
    assert np.isfinite(model.history["loss"]).all()
    assert not (tmp_path / "run" / "data").exists()
