"""Choice of masked tokens, and sums and counts over micro-batches."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import naming
from scipy.special import log_softmax

import scllm
from scllm.data import genes
from scllm.data.source import open_source
from scllm.engine.loader import Loader
from scllm.engine.objectives import Label, MaskedValue, objective_from_dict, objective_to_dict
from scllm.engine.objectives.base import uniform
from scllm.kernels.draws import mix, uniform_entries
from scllm.models.base import Batch, HeadSpec

int64 = st.integers(-(2**63), 2**63 - 1)


@pytest.fixture
def loader(toy, model):
    source = open_source(toy)
    obs = {"label:cell_type": toy.obs["cell_type"].cat.codes.to_numpy(np.int64)}
    obs |= {"label:regulator_level": toy.obs["regulator_level"].to_numpy(np.float32)}
    match = genes.match(source.genes, model.vocab)
    return Loader(source, np.arange(toy.n_obs), match, model.encoder, model.vocab, 24, obs=obs)


def hidden_genes(model, batch, ratio=0.5):
    """Return the ids of the masked genes of each cell, by the cell's key."""
    positions = MaskedValue().hide(batch, model.is_special, ratio)
    found = {int(key): set() for key in batch.keys}
    for position in positions:
        found[int(batch.keys[batch.cell[position]])].add(int(batch.genes[position]))
    return found


@given(st.lists(st.tuples(int64, st.integers(0, 2**31 - 1)), min_size=1, max_size=20), st.integers(0, 9))
@settings(deadline=None)
def test_torch_and_numba_draw_the_same_numbers(entries, salt):
    keys, ids = (np.array(column, np.int64) for column in zip(*entries))
    drawn = uniform(torch.from_numpy(keys), torch.from_numpy(ids), salt)
    np.testing.assert_array_equal(drawn.numpy(), uniform_entries(np.arange(len(ids) + 1), ids, keys, salt))


@pytest.mark.parametrize("ratio", [0.15, 0.25, 0.29, 0.3, 0.5, 0.7, 0.75, 0.99])
def test_the_share_is_rounded_down_in_every_cell_and_cls_is_never_masked(loader, model, ratio):
    for (batch,) in loader.epoch(0):
        found = hidden_genes(model, batch, ratio)
        wanted = [math.floor(ratio * (length - 1)) for length in batch.lengths]
        assert [len(found[int(key)]) for key in batch.keys] == wanted
        assert not any(set(model.vocab.special_ids.tolist()) & ids for ids in found.values())


def test_a_ratio_of_029_masks_28_of_100_genes():
    # 0.29 * 100 is 28.999999999999996, and 29 in float32
    n = 100
    batch = Batch(torch.arange(n), torch.ones(n), torch.tensor([0, n]), (n,), torch.tensor([7]))
    assert len(MaskedValue().hide(batch, torch.zeros(n, dtype=torch.bool), 0.29)) == 28


def test_masked_positions_do_not_depend_on_the_batch_or_the_processes(loader, model):
    def hidden(**how):
        found = {}
        for parts in loader.epoch(3, **how):
            for batch in parts:
                found |= hidden_genes(model, batch)
        return found

    alone = hidden()
    assert len(alone) == loader.source.n_obs
    assert hidden(parts=5) == alone
    for world in (2, 3):
        assert {key: ids for rank in range(world) for key, ids in hidden(rank=rank, world=world).items()} == alone


def test_another_epoch_masks_other_genes(loader, model):
    first, second = (next(iter(hidden_genes(model, next(loader.epoch(e))[0]).values())) for e in (0, 1))
    assert first != second


def test_every_gene_is_masked_equally_often():
    n_cells, n_genes = 4000, 20
    keys = torch.from_numpy(mix(0, np.arange(n_cells)))
    ends = torch.arange(n_cells + 1) * n_genes
    batch = Batch(torch.arange(n_genes).repeat(n_cells), None, ends, (n_genes,) * n_cells, keys)
    positions = MaskedValue().hide(batch, torch.zeros(n_genes, dtype=torch.bool), 0.25)
    share = torch.bincount(batch.genes[positions]) / n_cells
    torch.testing.assert_close(share, torch.full((n_genes,), 0.25), atol=5 * math.sqrt(0.25 * 0.75 / n_cells), rtol=0)


def test_the_ratio_depends_on_seed_and_step():
    ratios = (0.2, 0.4, 0.6)
    drawn = [MaskedValue(ratios, seed=5).ratio(step) for step in range(3000)]
    assert drawn == [ratios[int(mix(5, step) % 3)] for step in range(3000)]
    assert drawn != [MaskedValue(ratios, seed=6).ratio(step) for step in range(3000)]
    # the tolerance is five standard errors
    counts = np.unique(drawn, return_counts=True)[1]
    np.testing.assert_allclose(counts, 1000, atol=5 * math.sqrt(3000 * 2 / 9))


@pytest.mark.parametrize("ratio", [(), (0.0,), (1.0,), (0.5, 1.5)])
def test_a_mask_ratio_that_masks_nothing_or_everything_is_an_error(ratio):
    with pytest.raises(ValueError, match=naming("mask_ratio", ratio, "0", "1")):
        MaskedValue(ratio)


def added(objective, model, parts, step=2):
    """Return sum, count, logged sums and gradient over micro-batches."""
    model.zero_grad()
    total, count, logged = 0.0, 0, defaultdict(float)
    for batch in parts:
        loss = objective(model, batch, step)
        loss.sum.backward()
        total, count = total + loss.sum.item(), count + int(loss.count)
        for name, value in loss.logged.items():
            logged[name] += float(value.detach())
    gradient = torch.cat([w.grad.reshape(-1) for w in model.parameters() if w.grad is not None])
    assert set(logged) == set(objective.logs(model))
    return {"loss": total, "count": count, **logged}, gradient


@pytest.mark.parametrize(
    "objective",
    [
        MaskedValue(),
        MaskedValue(from_cell=0.0),
        MaskedValue(left_out=0.3),
        Label(),
        Label({"bce": 1.0, "focal": 2.0}, class_weight={"cell_type": (1.0, 2.0, 3.0, 4.0)}),
        Label(label_smoothing=0.1),
    ],
    ids=["masked", "masked, not from cell", "held out", "ce", "bce and focal, weighted", "ce, smoothed"],
)
def test_micro_batches_add_up_to_the_batch(loader, model, objective):
    loader.obs["label:cell_type"][::5] = -1
    loader.obs["label:regulator_level"][1::5] = np.nan
    model.set_heads([HeadSpec("cell_type", ("a", "b", "c", "d")), HeadSpec("regulator_level", None, 0.5, 0.3)])
    model.eval()
    found, gradient = added(objective, model, next(loader.epoch(0)))
    assert found["count"] > 0
    for n_parts in (3, 24):
        split, split_gradient = added(objective, model, next(loader.epoch(0, parts=n_parts)))
        assert split == pytest.approx(found, rel=1e-5)
        torch.testing.assert_close(split_gradient, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_the_masked_loss_is_the_squared_error_of_the_masked_values(loader, model):
    model.eval()
    (batch,) = next(loader.epoch(0))
    objective = MaskedValue((0.5,), from_cell=0.0)
    hidden = objective.hide(batch, model.is_special, 0.5)
    values = batch.values.clone()
    values[hidden] = -1
    predicted = model(batch.with_values(values)).heads["value"][hidden]
    loss = objective(model, batch, 0)
    torch.testing.assert_close(loss.sum, ((predicted - batch.values[hidden]) ** 2).sum())
    assert int(loss.count) == len(hidden)


def test_cells_without_genes_do_not_change_the_loss(model):
    cls = model.vocab.special_ids[:1]
    batch = Batch(torch.from_numpy(cls).long(), torch.zeros(1), torch.tensor([0, 1]), (1,), torch.tensor([3]))
    loss = MaskedValue()(model, batch, 0)
    loss.sum.backward()
    assert (loss.sum.item(), int(loss.count)) == (0, 0)


def test_cells_without_labels_do_not_change_the_loss(loader, model):
    loader.obs["label:cell_type"][:] = -1
    model.set_heads([HeadSpec("cell_type", ("a", "b", "c", "d"))])
    (batch,) = next(loader.epoch(0))
    loss = Label()(model, batch, 0)
    loss.sum.backward()
    assert (loss.sum.item(), int(loss.count)) == (0, 0)
    assert not model.heads[0].out.weight.grad.any()


@pytest.mark.parametrize(
    "objective", [MaskedValue((0.1, 0.2), from_cell=0.5, seed=7), Label({"ce": 1.0, "dice": 0.5}, {"a": (1.0, 2.0)})]
)
def test_saved_objectives_are_restored(objective):
    assert objective_from_dict(objective_to_dict(objective)) == objective


def test_counts_are_downsampled_only_in_training(toy, model):
    source = open_source(toy)
    match = genes.match(source.genes, model.vocab)
    rows, encoder = np.arange(toy.n_obs), scllm.models.ValueEncoder(max_len=99, target_sum=None)

    def total(**how):
        cells = Loader(source, rows, match, encoder, model.vocab, 120, **how)
        return sum(float(batch.values.sum()) for (batch,) in cells.epoch(0))

    assert total(downsample=0.5) < 0.9 * total()
    assert total(downsample=0.5, training=False) == total(training=False)


def test_losses_are_weighted_as_asked():
    rng = np.random.default_rng(0)
    logits, codes, weight = rng.normal(size=(12, 3)), rng.integers(3, size=12), np.array([1.0, 2.0, 0.5])
    objective = Label({"ce": 2.0, "bce": 0.5}, class_weight={"a": tuple(weight.tolist())}, label_smoothing=0.1)
    specs, labels = (HeadSpec("a", ("x", "y", "z")),), {"label:a": torch.tensor(codes)}
    found = objective.of(specs, {"a": torch.tensor(logits).float()}, labels)
    one = np.eye(3)[codes]
    ce = -((0.9 * one + 0.1 / 3) * weight * log_softmax(logits, 1)).sum()
    p = 1 / (1 + np.exp(-logits))
    bce = -(weight[codes] * (one * np.log(p) + (1 - one) * np.log(1 - p)).sum(1)).sum()
    assert float(found.sum) == pytest.approx(2 * ce + 0.5 * bce, rel=1e-5)
