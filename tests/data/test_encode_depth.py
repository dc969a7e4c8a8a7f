"""Token sequences with the sequencing depth, and those of levels, compared with a loop over cells."""

from __future__ import annotations

import math

import numpy as np
import pytest
from messages import naming

from scllm.data.encode import DepthEncoder, LevelEncoder, encoder_from_dict, encoder_to_dict
from scllm.data.tokens import Tokens
from scllm.data.vocab import Vocab

GENES = [f"g{i}" for i in range(8)]
DEPTHS = Vocab((*GENES, "<T>", "<S>", "<pad>"), mask=None, cls=None)
LEVELS = Vocab((*GENES, "<eos>"), pad=None, mask=None, cls=None, eos="<eos>")
COUNTS = np.array([[0, 3, 0, 1, 96, 0, 0, 0], [0] * 8, [5, 0, 0, 0, 0, 0, 0, 5], [1, 2, 3, 4, 5, 6, 7, 8]], np.float32)


def encode(encoder, vocab, keys=None):
    tokens = Tokens(
        np.concatenate([[0], np.cumsum((COUNTS > 0).sum(1))]),
        np.nonzero(COUNTS)[1].astype(np.int32),
        COUNTS[COUNTS > 0],
    )
    found = encoder(tokens, vocab, keys, measured=np.arange(8, dtype=np.int32))
    return [found.slice(i, i + 1) for i in range(len(found))]


@pytest.mark.parametrize(
    ("target", "asked"),
    [
        ("t4", lambda n: 4),
        ("t2.5", lambda n: 2.5),
        ("f2", lambda n: math.log10(2 * n)),
        ("f1", math.log10),
        ("a1", lambda n: math.log10(n) + 1),
        ("a-0.5", lambda n: math.log10(n) - 0.5),
    ],
)
def test_depths_stand_at_the_end_and_values_are_log_normalised(target, asked):
    for cell, found in zip(COUNTS, encode(DepthEncoder(target), DEPTHS)):
        total = max(1, cell.sum())
        there = np.flatnonzero(cell)
        assert found.genes.tolist() == [*there, 8, 9]
        expected = [*np.log1p(cell[there] / total * 1e4), asked(total), math.log10(total)]
        np.testing.assert_allclose(found.values, expected, rtol=1e-6, atol=1e-6)


def test_a_cut_cell_keeps_its_highest_values_and_its_whole_depth():
    found = encode(DepthEncoder(max_len=5), DEPTHS)[3]
    assert found.genes.tolist() == [5, 6, 7, 8, 9]
    np.testing.assert_allclose(found.values[-1], math.log10(36), rtol=1e-6)
    drawn = [tuple(encode(DepthEncoder(max_len=5), DEPTHS, np.full(4, key))[3].genes) for key in range(20)]
    assert len(set(drawn)) > 5
    assert all(genes[-2:] == (8, 9) and len(genes) == 5 for genes in drawn)


def test_normalised_values_are_read_as_they_are_and_their_sum_is_the_depth():
    found = encode(DepthEncoder("f1", normalised=True), DEPTHS)[2]
    np.testing.assert_allclose(found.values, [5, 5, 1, 1])
    assert not DepthEncoder(normalised=True).needs_counts


def test_levels_are_whole_powers_of_two_of_every_gene():
    for cell, found in zip(COUNTS, encode(LevelEncoder(), LEVELS)):
        expected = [min(5, math.floor(math.log2(1 + count / max(1, cell.sum()) * 1e4))) for count in cell]
        assert found.genes.tolist() == [*range(8), 8]
        assert found.values.tolist() == [*expected, 0]


def test_logarithms_are_rounded_alike_on_every_processor():
    counts = np.arange(1, 1001, dtype=np.float32)
    found = LevelEncoder().log2(Tokens(np.array([0, 1000]), np.arange(1000, dtype=np.int32), counts))
    normalised = counts / (counts.sum() / np.float32(1e4))
    rounded = [np.float32(math.log1p(value)) for value in normalised.tolist()]
    assert found.tolist() == [float(np.float32(float(value) / math.log(2))) for value in rounded]


@pytest.mark.parametrize("encoder", [DepthEncoder("a1", 99, True), LevelEncoder(4, 99)])
def test_settings_survive_saving(encoder):
    assert encoder_from_dict(encoder_to_dict(encoder)) == encoder


@pytest.mark.parametrize(
    ("kind", "wrong", "values"),
    [
        (DepthEncoder, {"target": "x4"}, ("target", "got 'x4'", "'t4'")),
        (DepthEncoder, {"target": "tfour"}, ("target", "got 'tfour'", "'t4'")),
        (DepthEncoder, {"target": "f0"}, ("target", "got 'f0'", "'f1'")),
        (DepthEncoder, {"max_len": 2}, ("max_len", "got 2", 3)),
        (LevelEncoder, {"n_levels": 1}, ("n_levels", "got 1", 2, 256)),
    ],
)
def test_settings_that_make_no_sense_are_an_error(kind, wrong, values):
    with pytest.raises(ValueError, match=naming(*values)):
        kind(**wrong)


def test_vocabularies_of_other_families_are_an_error():
    with pytest.raises(ValueError, match=naming("<T>", "<S>", "got ('<cls>', '<pad>', '<mask>')")):
        encode(DepthEncoder(), Vocab.from_genes(GENES))
