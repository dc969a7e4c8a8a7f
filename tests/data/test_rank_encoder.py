"""Rank-ordered token sequences against a slow version."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import naming

from scllm.data.encode import RankEncoder, encoder_from_dict, encoder_to_dict
from scllm.data.tokens import Tokens
from scllm.data.vocab import Vocab

VOCAB = Vocab.from_tokens(["<pad>", "<mask>", "<cls>", "<eos>", *(f"g{i}" for i in range(30))])
MEASURED = np.arange(4, 34)


@st.composite
def cells(draw):
    """Counts of some cells as ragged rows, one of them empty, and medians of which some are missing."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = [np.sort(rng.choice(MEASURED, rng.integers(0, 31), replace=False)) for _ in range(4)]
    rows[2] = rows[2][:0]
    genes = np.concatenate(rows).astype(np.int32)
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    medians = rng.choice([0.5, 1, 3, np.nan], len(VOCAB))
    return Tokens(indptr, genes, rng.geometric(0.4, len(genes)).astype(np.float32)), medians


def sentence_slowly(counts, cell, medians, encoder):
    begin, end = counts.indptr[cell], counts.indptr[cell + 1]
    pairs = zip(counts.genes[begin:end].tolist(), counts.values[begin:end].tolist(), strict=True)
    known = {gene: value / medians[gene] for gene, value in pairs if np.isfinite(medians[gene])}
    genes = sorted(known, key=lambda gene: -known[gene])[: encoder.max_len - encoder.n_specials]
    return [VOCAB.cls_id] * encoder.cls + genes + [VOCAB.eos_id] * encoder.eos


def row_of(tokens, cell):
    return tokens.genes[tokens.indptr[cell] : tokens.indptr[cell + 1]].tolist()


@settings(deadline=None, max_examples=60)
@given(cells(), st.sampled_from([3, 9, 61]), st.booleans(), st.booleans(), st.booleans())
def test_genes_fall_by_count_over_median_between_the_specials(data, max_len, cls, eos, with_medians):
    counts, medians = data
    medians = medians if with_medians else np.ones(len(VOCAB))
    encoder = RankEncoder(max_len, cls, eos, medians if with_medians else None)
    tokens = encoder(counts, VOCAB, measured=MEASURED)
    assert tokens.values is None
    for cell in range(4):
        assert row_of(tokens, cell) == sentence_slowly(counts, cell, medians, encoder)


@settings(deadline=None, max_examples=40)
@given(cells())
def test_training_keeps_a_random_subset_of_genes_keyed_by_the_cell(data):
    counts, medians = data
    encoder, keys = RankEncoder(8, True, True, medians), np.array([1, 2, 3, 4])
    whole = RankEncoder(99, True, True, medians)(counts, VOCAB, measured=MEASURED)
    tokens = encoder(counts, VOCAB, keys, measured=MEASURED)
    for cell in range(4):
        kept, all_of = row_of(tokens, cell), row_of(whole, cell)
        assert len(kept) == min(len(all_of), 8)
        assert kept == [token for token in all_of if token in kept]
        alone = encoder(counts.take(np.array([cell])), VOCAB, keys[[cell]], measured=MEASURED)
        assert row_of(alone, 0) == kept


def test_medians_survive_saving_and_their_absence_is_an_error():
    encoder = RankEncoder(7, True, False, np.array([1.0, np.nan, 2.5]))
    again = encoder_from_dict(encoder_to_dict(encoder), encoder.arrays)
    assert again == encoder
    np.testing.assert_array_equal(again.medians, encoder.medians)
    with pytest.raises(ValueError, match=naming("medians", "extras.npz")):
        encoder_from_dict(encoder_to_dict(encoder))


def test_other_medians_are_other_settings():
    assert encoder_to_dict(RankEncoder(medians=np.ones(3))) != encoder_to_dict(RankEncoder(medians=np.full(3, 2.0)))


def test_medians_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match=naming("medians", "got 0", "NaN")):
        RankEncoder(medians=np.array([1.0, 0.0]))
    counts = Tokens(np.array([0, 1]), np.array([4]), np.ones(1, np.float32))
    with pytest.raises(ValueError, match=naming("got 3", "34")):
        RankEncoder(medians=np.ones(3))(counts, VOCAB, measured=MEASURED)
