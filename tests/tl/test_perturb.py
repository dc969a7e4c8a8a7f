"""In-silico perturbations: edits of token sequences, shifts, and their comparison with other genes."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from messages import naming
from scipy import sparse, stats

from scllm import datasets, metrics, models, tl
from scllm.data.genes import match
from scllm.data.source import open_source
from scllm.engine.in_silico import Edit, edited_batches
from scllm.models.base import Batch

FAMILIES = ["scgpt", "geneformer", "gpt2", "scbert", "scfoundation"]


def table(adata, key="perturb"):
    return adata.uns["scllm"][key]["table"]


def batch_of(adata, model):
    source = open_source(adata)
    found = match(source.genes, model.vocab, var=source.var)
    return Batch.from_tokens(
        model.encoder(found.tokens(source.read(slice(None))), model.vocab, measured=found.measured)
    )


def without(adata, gene):
    """The same cells without the counts of a gene."""
    changed = adata.copy()
    kept = np.ones(adata.n_vars, np.float32)
    kept[gene] = 0
    changed.X = (adata.X @ sparse.diags(kept)).tocsr().astype(np.float32)
    changed.X.eliminate_zeros()
    return changed


def sequences(batch):
    return [part.tolist() for part in batch.genes.split(list(batch.lengths))]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_parity_geneformer_in_silico(shared, version):
    parity = shared / "parity" / "geneformer"
    expected = np.load(parity / "in_silico.npz")
    model = models.load(
        parity / f"model_{version}", family="geneformer",
        vocab=parity / "dictionaries" / f"token_dictionary_{version}.json",
    )  # fmt: skip
    cells = ad.read_h5ad(parity / "adata.h5ad")
    names = expected[f"{version}_cells_longest_first"]
    cells = cells[[list(cells.obs["cell_id"]).index(name) for name in names]].copy()
    cells.obs["cell_id"] = cells.obs["cell_id"].astype(str).astype("category")
    # the original's layer -1 is the one before the last; without <cls> it compares genes and averages over them
    column, what = ("cell_shift", "cls") if version == "v2" else ("gene_shift", "cell")
    for mode in ("delete", "overexpress"):
        gene = str(expected[f"{version}_{mode}_gene"])
        tl.perturb(
            cells, model, genes=[gene], mode=mode, groupby="cell_id", n_null=0,
            hidden_layer=int(expected["emb_layer"]) - 1,
        )  # fmt: skip
        found = 1 - table(cells).set_index("group")[column].loc[list(names)]
        np.testing.assert_allclose(found, expected[f"{version}_{mode}_{what}_cos_sim"], atol=1e-5)


def test_deleted_gene_is_as_in_cells_that_lack_it(adata):
    """For ranks, a sequence without a token is that of the cell without the gene's counts."""
    model = models.build("geneformer", vocab=adata.var_names, size="tiny").eval()
    token = int(model.vocab.ids(["gene_3"])[0])
    (copies,) = edited_batches(model, batch_of(adata, model), [Edit((token,), "delete")])
    lacking = without(adata, 3)
    expected = sequences(batch_of(lacking, model))
    assert sequences(copies.batch) == [expected[cell] for cell in copies.cell]
    assert sorted(copies.cell) == np.flatnonzero(adata.X[:, 3].toarray()[:, 0]).tolist()


def test_overexpressed_gene_comes_first_or_is_highest_and_is_inserted(adata):
    ranks = models.build("geneformer", vocab=adata.var_names, size="tiny", max_len=15).eval()
    token = int(ranks.vocab.ids(["gene_3"])[0])
    original = sequences(batch_of(adata, ranks))
    (copies,) = edited_batches(ranks, batch_of(adata, ranks), [Edit((token,), "overexpress")])
    for old, new in zip(original, sequences(copies.batch), strict=True):
        rest = [one for one in old[1:-1] if one != token]
        assert new == [old[0], *[token, *rest][: 15 - 2], old[-1]]
    values = models.build("scgpt", vocab=adata.var_names, size="tiny").eval()
    batch = batch_of(adata, values)
    (copies,) = edited_batches(values, batch, [Edit((3,), "overexpress")])
    for cell in range(copies.batch.n_cells):
        one, before = copies.batch.cells(cell, cell + 1), batch.cells(cell, cell + 1)
        assert one.values[one.genes == 3].item() == before.values.max()
        assert (one.genes[1:].diff() > 0).all()


def test_degree_moves_a_gene_in_the_order_of_expression(adata):
    model = models.build("geneformer", vocab=adata.var_names, size="tiny").eval()
    batch = batch_of(adata, model)
    genes = sequences(batch)[0][1:-1]
    token = genes[10]
    for degree, place in ((0.25, max(0, round(10 - 0.25 * len(genes)))), (-1.0, len(genes) - 1)):
        copies = next(edited_batches(model, batch.cells(0, 1), [Edit((token,), degree)]))
        moved = sequences(copies.batch)[0][1:-1]
        assert moved.index(token) == place
        assert [g for g in moved if g != token] == [g for g in genes if g != token]


@pytest.mark.parametrize("family", FAMILIES)
def test_shift_is_that_of_embedding_the_edited_cell(adata, family):
    """Compare with one cell and one edit at a time, without packing."""
    adata = adata[:6].copy()
    model = models.build(family, vocab=adata.var_names, size="tiny").eval()
    tl.perturb(adata, model, genes=["gene_22"], n_null=0)
    batch = batch_of(adata, model)
    shifts = []
    with torch.no_grad():
        for cell in range(6):
            one = batch.cells(cell, cell + 1)
            for copies in edited_batches(model, one, [Edit((int(model.vocab.ids(["gene_22"])[0]),), "delete")]):
                pair = model.embed(one), model.embed(copies.batch)
                shifts.append(1 - torch.nn.functional.cosine_similarity(*pair).item())
    row = table(adata).iloc[0]
    assert row["n_cells"] == len(shifts) > 0
    assert row["cell_shift"] == pytest.approx(np.mean(shifts), abs=1e-5)
    assert adata.obsm["X_scllm_perturb"].shape == adata.obsm["X_scllm_perturb_before"].shape


def test_shift_to_a_goal_is_the_change_of_similarity_to_its_mean_embedding(adata, tiny):
    tl.perturb(adata, tiny, genes=["gene_21"], groupby="cell_type", goal=("A", "B"), n_null=0)
    tl.embed(adata, tiny)
    before, after = adata.obsm["X_scllm_perturb_before"], adata.obsm["X_scllm_perturb"]
    np.testing.assert_allclose(before, adata.obsm["X_scllm"], atol=1e-6)
    is_a = (adata.obs["cell_type"] == "A").to_numpy()
    changed = is_a & (adata.X[:, 21].toarray()[:, 0] > 0)
    center = before[~is_a].mean(0)
    near = [one @ center / np.linalg.norm(one, axis=1) / np.linalg.norm(center) for one in (before, after)]
    values = (near[1] - near[0])[changed]
    row = table(adata).iloc[0]
    assert (row["group"], row["state"], row["n_cells"]) == ("A", "B", changed.sum())
    assert row["goal_shift"] == pytest.approx(values.mean(), abs=1e-6)
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    assert row["high"] - row["low"] == pytest.approx(2 * half, rel=1e-2)


def test_null_genes_are_matched_by_expression_and_named(adata, tiny):
    tl.perturb(adata, tiny, genes=["gene_21", ("gene_1", "gene_2")], n_null=40)
    found = table(adata)
    asked = found[~found["is_null"]]
    assert list(asked["perturbation"]) == ["gene_21", "gene_1+gene_2"]
    assert asked["q_value"].notna().all()
    np.testing.assert_allclose(asked["q_value"], stats.false_discovery_control(asked["p_value"]))
    nulls = found[found["is_null"]]
    assert not {"gene_21", "gene_1", "gene_2"} & {g for name in nulls["perturbation"] for g in name.split("+")}
    assert set(nulls["perturbation"].str.count(r"\+")) == {0, 1}


def test_all_genes_are_compared_with_each_other(adata, tiny):
    tl.perturb(adata, tiny, genes="all", max_cells=10)
    found = table(adata)
    assert not found["is_null"].any()
    assert set(found["perturbation"]) <= set(adata.var_names)
    assert sorted(found["rank"].dropna()) == list(range(1, found["rank"].notna().sum() + 1))


def test_order_of_cells_and_genes_does_not_matter(adata, tiny):
    other = adata[::-1, ::-1].copy()
    for one in (adata, other):
        tl.perturb(one, tiny, genes=["gene_21", "gene_3"], n_null=20)
    tables = [table(one).set_index("perturbation").sort_index() for one in (adata, other)]
    numbers = tables[0].select_dtypes("number").columns
    assert set(tables[0].index) == set(tables[1].index)
    pd.testing.assert_frame_equal(tables[0][["cell_shift"]], tables[1][["cell_shift"]], rtol=1e-3, atol=1e-8)
    assert len(numbers)


def test_copy_leaves_the_original_and_files_take_the_result(adata, tiny, tmp_path):
    changed = tl.perturb(adata, tiny, genes=["gene_21"], n_null=0, copy=True)
    assert "scllm" not in adata.uns
    assert not len(adata.obsm)
    changed.write_h5ad(tmp_path / "a.h5ad")
    back = ad.read_h5ad(tmp_path / "a.h5ad")
    pd.testing.assert_frame_equal(table(back), table(changed), check_dtype=False)
    back[:5, :7].copy().write_h5ad(tmp_path / "b.h5ad")


def test_backed_data_give_the_same(adata, tiny, tmp_path):
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    for one in (adata, backed):
        tl.perturb(one, tiny, genes=["gene_21"], n_null=0)
    assert table(backed)["cell_shift"].iloc[0] == table(adata)["cell_shift"].iloc[0]
    backed.file.close()


def test_an_interrupted_call_is_resumed(adata, tiny, tmp_path, monkeypatch):
    tl.perturb(adata, tiny, genes=["gene_21"], n_null=20)
    expected = table(adata)
    from scllm.tl import _perturb_run

    shifts, calls = _perturb_run.PerturbRun._shifts, []

    def fails_at_third(self, model, batch, *rest):
        calls.append(batch.n_cells)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return shifts(self, model, batch, *rest)

    monkeypatch.setattr(_perturb_run.PerturbRun, "_shifts", fails_at_third)
    with pytest.raises(KeyboardInterrupt):
        tl.perturb(adata, tiny, genes=["gene_21"], n_null=20, run_dir=tmp_path / "run")
    tl.perturb(adata, tiny, genes=["gene_21"], n_null=20, run_dir=tmp_path / "run")
    assert sum(calls) - calls[2] == adata.n_obs
    pd.testing.assert_frame_equal(table(adata), expected)
    with pytest.raises(ValueError, match="those of another call"):
        tl.perturb(adata, tiny, genes=["gene_3"], n_null=20, run_dir=tmp_path / "run")


def test_cost_is_said_before(adata, tiny, caplog):
    with caplog.at_level("INFO", logger="scllm"):
        tl.perturb(adata, tiny, genes=["gene_21"], n_null=0)
    n = int((adata.X[:, 21].toarray() > 0).sum())
    assert f"up to {n} forward passes" in caplog.text


@pytest.mark.parametrize(
    ("options", "error", "values"),
    [
        ({"genes": ["nothing"]}, KeyError, ["'nothing'"]),
        ({"genes": []}, ValueError, ["'all'"]),
        ({"genes": [("gene_1", "gene_1")]}, ValueError, ["'gene_1+gene_1'"]),
        ({"genes": ["gene_1"], "mode": "remove"}, ValueError, ["'delete'", "'remove'"]),
        ({"genes": ["gene_1"], "mode": 2.0}, ValueError, ["2.0"]),
        ({"genes": ["gene_1"], "goal": "B"}, TypeError, ["'B'", "groupby"]),
        ({"genes": ["gene_1"], "groupby": "cell_type", "goal": "C"}, KeyError, ["'C'"]),
        ({"genes": ["gene_1"], "groupby": "cell_typ"}, KeyError, ["'cell_typ'", "'cell_type'"]),
        ({"genes": ["gene_1"], "max_cells": 0}, ValueError, ["max_cells", "0"]),
        ({"genes": ["gene_1"], "n_null": -1}, ValueError, ["n_null", "-1"]),
        ({"genes": ["gene_1"], "hidden_layer": 9}, ValueError, ["hidden_layer", "9"]),
        ({"genes": ["gene_1"], "pooling": "average"}, ValueError, ["'average'", "'cls'"]),
    ],
)
def test_bad_input_raises(adata, tiny, options, error, values):
    with pytest.raises(error, match=naming(*values)):
        tl.perturb(adata, tiny, **options)
    assert "scllm" not in adata.uns


def test_names_that_are_no_genes_are_listed_and_silent_genes_are_left_out(adata, tiny):
    adata = without(adata, 5)
    with pytest.warns(UserWarning, match=naming("'nothing'")):
        tl.perturb(adata, tiny, genes=["gene_1", "nothing"], n_null=0)
    with pytest.warns(UserWarning, match=naming("'gene_5'")):
        tl.perturb(adata, tiny, genes=["gene_1", "gene_5"], n_null=0)
    with pytest.raises(ValueError, match=naming("'gene_5'", "overexpress")):
        tl.perturb(adata, tiny, genes=["gene_5"], n_null=0)
    tl.perturb(adata, tiny, genes=["gene_5"], mode="overexpress", n_null=0)
    assert table(adata)["n_cells"].iloc[0] == adata.n_obs


def test_combinations_that_no_cell_expresses_together_are_left_out(adata, tiny):
    counts = adata.X.toarray()
    counts[:, 5] *= counts[:, 6] == 0
    counts[0, [5, 6]] = 3, 0
    adata.X = type(adata.X)(counts)
    with pytest.warns(UserWarning, match=naming("'gene_5+gene_6'")):
        tl.perturb(adata, tiny, genes=["gene_1", ("gene_5", "gene_6")], n_null=0)
    assert table(adata)["perturbation"].tolist() == ["gene_1"]
    with pytest.raises(ValueError, match=naming("'gene_5+gene_6'")):
        tl.perturb(adata, tiny, genes=[("gene_5", "gene_6")], n_null=0)


def test_false_discoveries_are_as_rare_as_promised_when_labels_are_permuted():
    """On permuted states no gene moves cells to the goal: any discovery is false, and at most 5 % of calls have one."""
    adata = datasets.toy(n_cells=40, n_genes=60)
    torch.manual_seed(0)
    model = models.build("scgpt", vocab=adata.var_names, n_layers=1, n_heads=2, d_model=16, d_hidden=16).eval()
    batch = batch_of(adata, model)
    edits = [Edit((token,), "delete") for token in range(60)]
    with torch.no_grad():
        before = model.embed(batch).numpy().astype(float)
        moves, of_edit, of_cell = [], [], []
        for copies in edited_batches(model, batch, edits):
            moves.append(model.embed(copies.batch).numpy() - before[copies.cell])
            of_edit.append(copies.edit)
            of_cell.append(copies.cell)
    moves, of_edit, of_cell = map(np.concatenate, (moves, of_edit, of_cell))
    expressed = np.asarray((adata.X > 0).sum(0)).ravel()
    usable = np.flatnonzero(expressed >= 4)
    level = np.log1p(np.asarray(adata.X.mean(0)).ravel())
    rng, n_false = np.random.default_rng(0), 0
    for _ in range(200):
        is_goal = rng.permutation(np.arange(40) % 2 == 0)
        center = before[is_goal].mean(0)
        shift = moves @ (center / np.linalg.norm(center))
        start = ~is_goal[of_cell]
        n = np.bincount(of_edit[start], minlength=60)
        mean = np.bincount(of_edit[start], shift[start], minlength=60) / np.maximum(n, 1)
        asked = rng.permutation(usable)
        is_null = np.ones(len(asked), bool)
        is_null[:10] = False
        found = metrics.matched_null_test(mean[asked], level[asked], is_null)
        n_false += bool((found["q_value"] < 0.05).any())
    assert n_false <= stats.binom.ppf(0.99, 200, 0.05)


def test_settings_can_be_read_from_json(adata, tiny):
    tl.perturb(adata, tiny, genes=["gene_21"], n_null=0)
    params = adata.uns["scllm"]["perturb"]["params"]
    assert json.dumps({name: str(value) for name, value in params.items()})
    assert params["shown"] == "gene_21"
