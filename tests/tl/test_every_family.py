"""What every family does behind the same verbs, on data with planted types; its own file has what it does alone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from engine.runs import assert_same_curve, curve, interrupted, pretrain
from messages import naming
from scipy.sparse import csr_matrix

from scllm import datasets, models, tl
from scllm.models.base import HeadSpec

FAMILIES = ("scgpt", "geneformer", "scbert", "scfoundation", "gpt2", "albert", "xlnet")
# for scGPT engine/test_fit.py, for Geneformer test_pretrain_ranks.py asks what two processes give
IN_TWO_PROCESSES = ("scbert", "scfoundation", "gpt2", "albert", "xlnet")
PREDICT_ANY_GENE = ("scgpt", "scbert", "scfoundation")
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def _cells():
    return datasets.toy(n_cells=60, n_genes=40)


@pytest.fixture
def cells(_cells):
    """60 cells by 40 genes, four types."""
    return _cells.copy()


@pytest.fixture
def fresh(_cells):
    """A tiny model of a family over the genes of `cells`, in evaluation mode."""

    def build(family, **config):
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            return models.build(family, vocab=_cells.var_names, size="tiny", **config).eval()

    return build


def settings(family, fresh):
    """Two epochs; the Performers' random features are drawn anew on the way."""
    performer = family in ("scbert", "scfoundation")
    return {"model": fresh(family, redraw_every=2) if performer else family, "epochs": 2}


def test_no_family_is_left_out():
    assert set(FAMILIES) == set(models.families()) - {"spatial"}


@every_family
def test_an_interrupted_run_goes_on_to_the_same_history_and_weights(cells, fresh, family, tmp_path):
    options = settings(family, fresh) | {"dropout": 0.1, "config": {"save_every": 2}}
    whole = pretrain(cells, tmp_path / "whole", **copy.deepcopy(options))
    interrupted(cells, tmp_path / "broken", 3, **copy.deepcopy(options))
    again = pretrain(cells, tmp_path / "broken", **options)
    assert_same_curve(curve(tmp_path / "broken"), curve(tmp_path / "whole"))
    assert len(whole.history) > 8
    assert again.hash() == whole.hash()


@pytest.mark.slow
@pytest.mark.parametrize("family", IN_TWO_PROCESSES)
def test_two_processes_have_the_loss_curve_of_one(cells, fresh, family, tmp_path):
    options = settings(family, fresh) | {"dropout": 0.0}
    for n_procs in (1, 2):
        pretrain(cells, tmp_path / str(n_procs), n_procs=n_procs, **options)
    assert_same_curve(curve(tmp_path / "2"), curve(tmp_path / "1"))


@every_family
@pytest.mark.filterwarnings("ignore:after the first epoch")  # scbert, at first
def test_types_of_unseen_cells_are_told_after_fine_tuning(family):
    cells = datasets.toy(n_cells=210, n_genes=80)
    seen, unseen = cells[:150].copy(), cells[150:].copy()
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = models.build(family, vocab=cells.var_names, size="tiny")
    tuned = tl.finetune(seen, model, key="cell_type", epochs=12, batch_size=16, lr=1e-3, device="cpu")
    tl.classify(unseen, tuned)
    # four types: to be right on 27 of 60 cells by chance has a probability of 5e-4
    assert (unseen.obs["scllm_label"].astype(str) == unseen.obs["cell_type"].astype(str)).mean() >= 0.45


@every_family
def test_embeddings_depend_on_the_cell_alone_and_cells_without_genes_have_one(cells, fresh, family):
    cells = cells[:30].copy()
    cells.X = csr_matrix(cells.X.multiply(np.arange(30)[:, None] != 7))
    model = fresh(family)
    order = np.random.default_rng(0).permutation(30)
    with pytest.warns(UserWarning, match="1 of 30 cells"):
        tl.embed(cells, model)
    expected = cells.obsm["X_scllm"]
    assert np.isfinite(expected).all()
    assert len(np.unique(expected.round(4), axis=0)) == 30
    for batch_size in (1, 7):
        other = cells[order].copy()
        with pytest.warns(UserWarning, match="1 of 30 cells"):
            tl.embed(other, model, batch_size=batch_size)
        np.testing.assert_allclose(other.obsm["X_scllm"], expected[order], atol=1e-5)


@every_family
def test_a_saved_model_gives_the_same_bits(cells, fresh, family, tmp_path):
    cells, model = cells[:30].copy(), fresh(family)
    model.set_heads([HeadSpec("kind", ("A", "B"))])
    model.eval().save(tmp_path / "model")
    for key, one in (("here", model), ("loaded", models.load(tmp_path / "model"))):
        tl.embed(cells, one, key_added=key)
        tl.embed_genes(cells, one, key_added=key)
        tl.classify(cells, one, key_added=key)
        tl.reconstruct(cells, one, key_added=key)
    for there in (cells.obsm["loaded"], cells.varm["loaded"], cells.obsm["loaded_probabilities"]):
        assert np.isfinite(there).all()
    np.testing.assert_array_equal(cells.obsm["loaded"], cells.obsm["here"])
    np.testing.assert_array_equal(cells.varm["loaded"], cells.varm["here"])
    np.testing.assert_array_equal(cells.obsm["loaded_probabilities"], cells.obsm["here_probabilities"])
    assert (cells.layers["loaded"] != cells.layers["here"]).nnz == 0


@every_family
def test_genes_are_embedded_by_the_table_and_in_context(cells, fresh, family):
    cells, model = cells[:30, ::-1].copy(), fresh(family)
    tl.embed_genes(cells, model)
    table = model.gene_table().detach().numpy()[model.vocab.ids(cells.var_names)]
    np.testing.assert_array_equal(cells.varm["scllm_genes"], table)
    tl.embed_genes(cells, model, contextual=True, groupby="cell_type", key_added="contextual")
    n_expressing = np.stack(
        [cells[cells.obs["cell_type"] == one].X.getnnz(0) for one in cells.obs["cell_type"].cat.categories], axis=1
    )
    found = cells.varm["contextual"]
    assert found.shape == (40, 4, 64)
    np.testing.assert_array_equal(np.isfinite(found).all(2), n_expressing > 0)


@every_family
def test_expressed_genes_are_reconstructed_and_hidden_ones_unseen(cells, fresh, family):
    cells, model = cells[:30].copy(), fresh(family)
    tl.reconstruct(cells, model)
    assert (cells.layers["reconstructed"].astype(bool) != cells.X.astype(bool)).nnz == 0
    tl.reconstruct(cells, model, mask_ratio=0.3, key_added="hidden")
    hidden = cells.layers["hidden"]
    assert ((0 < np.diff(hidden.indptr)) & (np.diff(hidden.indptr) < np.diff(cells.X.indptr))).all()
    if family in PREDICT_ANY_GENE:
        assert np.isfinite(tl.reconstruct(cells, model, genes=list(cells.var_names[:3])).to_numpy()).all()
    else:
        with pytest.raises(ValueError, match=naming(family, "genes=")):
            tl.reconstruct(cells, model, genes=list(cells.var_names[:3]))


@every_family
def test_bf16_embeddings_are_those_of_fp32_after_centring(cells, fresh, family):
    # what all cells share makes the raw cosine nearly 1, whatever is lost of what tells them apart
    model = fresh(family)
    found = {}
    for precision in ("fp32", "bf16"):
        tl.embed(cells, model, device="cpu", precision=precision)
        found[precision] = cells.obsm["X_scllm"].astype(np.float64)
    exact, rounded = (values - values.mean(0) for values in found.values())
    norms = np.linalg.norm(exact, axis=1) * np.linalg.norm(rounded, axis=1)
    assert ((exact * rounded).sum(1) / norms).min() >= 0.995
    assert (found["fp32"] != found["bf16"]).any()
