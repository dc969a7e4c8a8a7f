"""Encoders against a slow version in plain numpy, and against scGPT's own tokenisation."""

from __future__ import annotations

import numpy as np
import pytest
from anndata import AnnData
from forms import FORMS, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import naming
from scipy import sparse

from scllm.data.encode import BinEncoder, ValueEncoder, encoder_from_dict, encoder_to_dict
from scllm.data.genes import GeneMatch
from scllm.data.tokens import Tokens
from scllm.data.vocab import Vocab

VOCAB = Vocab.from_genes([f"g{i}" for i in range(60)])
TIES = ("middle", "left", "right")


def bins_slowly(values, n_bins, ties):
    edges = np.quantile(values, np.linspace(0, 1, n_bins - 1)) if len(values) else np.zeros(1)
    upto, below = np.digitize(values, edges), np.digitize(values, edges, right=True)
    return {"middle": (upto + below + 1) // 2, "left": np.minimum(below + 1, upto), "right": upto}[ties]


def sentence_slowly(row, token_ids, encoder):
    """Tokens and values of one dense cell, read at inference."""
    there = sorted((gene for gene in range(len(row)) if token_ids[gene] >= 0), key=lambda gene: token_ids[gene])
    expressed = [gene for gene in there if row[gene]]
    if isinstance(encoder, BinEncoder):
        values = bins_slowly(row[expressed], encoder.n_bins, encoder.ties)
    else:
        values = np.log1p(row[expressed] / row[there].sum() * encoder.target_sum) if expressed else []
    value_of = dict(zip(expressed, values, strict=True))
    read = there if encoder.include_zeros else expressed
    room = encoder.max_len - (encoder.cls_value is not None)
    kept = sorted(sorted(read, key=lambda gene: -row[gene])[:room], key=lambda gene: token_ids[gene])
    first = [] if encoder.cls_value is None else [(VOCAB.cls_id, encoder.cls_value)]
    return first + [(token_ids[gene], value_of.get(gene, 0)) for gene in kept]


@st.composite
def cells(draw):
    """Dense counts of a few cells, one of them empty, and the token of each gene; some genes are unknown."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n_genes = draw(st.integers(1, 50))
    dense = rng.geometric(0.4, (4, n_genes)) * (rng.random((4, n_genes)) < rng.random((4, 1)))
    dense[2] = 0
    token_ids = rng.permutation(60)[:n_genes].astype(np.int32)
    token_ids[rng.random(n_genes) < 0.2] = -1
    return dense.astype(np.float32), token_ids


def encode(dense, token_ids, encoder, keys=None, **options) -> Tokens:
    match = GeneMatch(token_ids, "var_names", "symbol", 60)
    return encoder(match.tokens(sparse.csr_matrix(dense)), VOCAB, keys, measured=match.measured, **options)


def row_of(tokens: Tokens, cell: int) -> list[tuple]:
    row = tokens.take(np.array([cell]))
    return list(zip(row.genes.tolist(), row.values.tolist(), strict=True))


@settings(deadline=None, max_examples=80)
@given(
    cells(), st.sampled_from([2, 7, 51, 300]), st.sampled_from(TIES), st.sampled_from([2, 9, 61]),
    st.sampled_from([0, -2]), st.booleans(),
)  # fmt: skip
def test_bins_are_over_known_genes_highest_counts_are_kept_and_cls_is_first(data, n_bins, ties, max_len, cls, zeros):
    encoder = BinEncoder(n_bins, max_len, ties, cls, zeros)
    tokens = encode(*data, encoder)
    for cell, row in enumerate(data[0]):
        assert row_of(tokens, cell) == sentence_slowly(row, data[1], encoder)


@settings(deadline=None, max_examples=60)
@given(cells(), st.sampled_from([2, 9, 61]), st.sampled_from([0, None]), st.booleans())
def test_values_are_log_normalised_over_known_genes(data, max_len, cls, zeros):
    encoder = ValueEncoder(max_len=max_len, cls_value=cls, include_zeros=zeros)
    tokens = encode(*data, encoder)
    for cell, row in enumerate(data[0]):
        expected = sentence_slowly(row, data[1], encoder)
        found = row_of(tokens, cell)
        assert [token for token, _ in found] == [token for token, _ in expected]
        np.testing.assert_allclose([v for _, v in found], [v for _, v in expected], rtol=1e-6)


@settings(deadline=None, max_examples=40)
@given(cells(), st.sampled_from([BinEncoder(max_len=6), ValueEncoder(max_len=6, include_zeros=False)]))
def test_training_keeps_a_random_subset_keyed_by_the_key(data, encoder):
    keys = np.array([11, 12, 13, 14])
    whole = encode(*data, type(encoder)(include_zeros=False))
    tokens = encode(*data, encoder, keys)
    alone = [encode(data[0][[i]], data[1], encoder, keys[[i]]) for i in range(4)]
    for cell in range(4):
        kept, all_of = row_of(tokens, cell), row_of(whole, cell)
        assert kept[0] == (VOCAB.cls_id, 0)
        assert len(kept) == min(len(all_of), 6)
        assert kept == [token for token in all_of if token in kept]
        assert kept == row_of(alone[cell], 0)


def test_another_key_keeps_other_genes_and_every_gene_is_kept_as_often():
    dense, token_ids = np.arange(1, 21, dtype=np.float32)[None].repeat(2000, 0), np.arange(20, dtype=np.int32)
    tokens = encode(dense, token_ids, BinEncoder(max_len=6), np.arange(2000))
    counts = np.bincount(tokens.genes[tokens.genes != VOCAB.cls_id], minlength=20)
    # five standard errors of 2000 draws with a chance of 5 in 20
    assert np.abs(counts - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)


def test_a_cell_of_the_longest_length_is_not_cropped():
    dense = np.ones((1, 5), np.float32)
    assert encode(dense, np.arange(5, dtype=np.int32), BinEncoder(max_len=6)).lengths.tolist() == [6]
    assert encode(dense, np.arange(5, dtype=np.int32), BinEncoder(max_len=5)).genes.tolist()[1:] == [0, 1, 2, 3]


def test_zeros_are_those_of_measured_genes_in_the_order_of_tokens():
    tokens = encode(np.array([[0, 5, 0, 3]], np.float32), np.array([9, 2, -1, 4]), BinEncoder(7, include_zeros=True))
    assert row_of(tokens, 0) == [(60, 0), (2, 6), (4, 1), (9, 0)]


@settings(deadline=None, max_examples=40)
@given(cells(), st.integers(0, 3))
def test_random_ties_depend_on_the_genes_expressed_and_the_seed_alone(data, seed):
    dense, token_ids = data
    encoder = BinEncoder(ties="random")
    tokens = encode(dense, token_ids, encoder, random_state=seed)
    order = np.random.default_rng(0).permutation(dense.shape[1])
    moved = encode(dense[::-1][:, order], token_ids[order], encoder, random_state=seed)
    lowest, highest = (encode(dense, token_ids, BinEncoder(ties=ties)) for ties in ("left", "right"))
    for cell in range(4):
        assert dict(row_of(tokens, cell)) == dict(row_of(moved, 3 - cell))
    assert ((lowest.values <= tokens.values) & (tokens.values <= highest.values)).all()


def test_random_ties_change_with_the_seed_the_set_of_genes_and_the_key():
    dense, token_ids = np.ones((1, 40), np.float32), np.arange(40, dtype=np.int32)
    encoder = BinEncoder(ties="random")
    bins = encode(dense, token_ids, encoder).values
    assert len(set(bins[1:])) > 10
    assert (encode(dense, token_ids, encoder, random_state=1).values != bins).any()
    assert (encode(dense[:, :39], token_ids[:39], encoder).values != bins[:40]).any()
    by_key = [encode(dense, token_ids, encoder, np.array([key])).values for key in (1, 2, 1)]
    assert (by_key[0] != by_key[1]).any()
    np.testing.assert_array_equal(by_key[0], by_key[2])


@pytest.mark.parametrize("encoder", [BinEncoder(7, 99, "left", -2, True), ValueEncoder(50, None, None, False)])
def test_settings_survive_saving(encoder):
    assert encoder_from_dict(encoder_to_dict(encoder)) == encoder


@pytest.mark.parametrize("saved", [{"kind": "Unknown"}, {"kind": "BinEncoder", "new": 1}, {}])
def test_unknown_encoders_are_an_error(saved):
    with pytest.raises(ValueError, match=naming("'BinEncoder'", f"got {saved}")):
        encoder_from_dict(saved)


@pytest.mark.parametrize(
    ("wrong", "values"),
    [
        ({"n_bins": 1}, ("n_bins", "got 1", 2)),
        ({"n_bins": 65_537}, ("n_bins", "got 65537", "65,536")),
        ({"ties": "mean"}, ("ties", "got 'mean'", "'middle'")),
        ({"max_len": 1}, ("max_len", "got 1", 2)),
    ],
)
def test_settings_that_make_no_sense_are_an_error(wrong, values):
    with pytest.raises(ValueError, match=naming(*values)):
        BinEncoder(**wrong)


# --- outputs of the original, see the README of the fixtures ---


@pytest.fixture(scope="session")
def parity(shared):
    return shared / "parity" / "scgpt"


@pytest.fixture(scope="session")
def tokenized(parity):
    return dict(np.load(parity / "tokenize.npz"))


@pytest.fixture(scope="session")
def vocab(parity):
    # tokens beside <pad> and <cls>: the file of the original has no <mask>
    return Vocab.read(parity / "checkpoint" / "vocab.json")


def encode_original(tokenized, vocab, encoder, keys=None, form="csr") -> Tokens:
    match = GeneMatch(tokenized["tok_gene_ids"].astype(np.int32), "var_names", "symbol", len(vocab.genes))
    counts = rows_of(AnnData(FORMS[form](tokenized["tok_data"].astype(np.float32))))
    return encoder(match.tokens(counts), vocab, keys, measured=match.measured)


def in_token_order(genes, values, vocab):
    """Padded rows of the original, which stand in the order of its columns, put in ours: `<cls>`, tokens, padding."""
    key = np.where(genes == vocab.cls_id, -1, np.where(genes == vocab.pad_id, len(vocab), genes))
    order = np.argsort(key, axis=1, kind="stable")
    return np.take_along_axis(genes, order, 1), np.take_along_axis(values, order, 1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("zeros", [0, 1])
@pytest.mark.parametrize("cls", [0, 1])
def test_parity_scgpt_tokens(tokenized, vocab, zeros, cls, form):
    encoder = ValueEncoder(target_sum=None, include_zeros=bool(zeros), cls_value=0 if cls else None)
    tokens = encode_original(tokenized, vocab, encoder, form=form)
    genes, values = tokens.padded(pad_id=vocab.pad_id, pad_value=-2)
    theirs = (tokenized[f"tok_{name}_zero{zeros}_cls{cls}"] for name in ("genes", "values"))
    expected_genes, expected_values = in_token_order(*theirs, vocab)
    np.testing.assert_array_equal(genes, expected_genes)
    np.testing.assert_array_equal(values, expected_values)


def test_parity_scgpt_replayed_samples_are_subsets_of_our_sequences(tokenized, vocab):
    """Which tokens the original keeps is its generator's choice: played back, they are those of our whole sentence."""
    whole = encode_original(tokenized, vocab, ValueEncoder(target_sum=None, include_zeros=False))
    max_len = int(tokenized["tok_sampled_max_len"])
    generator = np.random.RandomState(int(tokenized["tok_sampled_seed"]))
    column = {token: place for place, token in enumerate(tokenized["tok_gene_ids"].tolist())}
    pairs = zip(tokenized["tok_sampled_genes"], tokenized["tok_sampled_values"], strict=True)
    for cell, (genes, values) in enumerate(pairs):
        row = whole.take(np.array([cell]))
        # it draws among places in the order of the columns
        places = np.array(sorted(range(len(row.genes)), key=lambda at: column.get(row.genes[at], -1)))
        if len(places) > max_len:
            drawn = generator.choice(len(places) - 1, max_len - 1, replace=False)
            places = places[np.concatenate([[0], drawn + 1])]
        n = len(places)
        np.testing.assert_array_equal(genes[:n], row.genes[places])
        np.testing.assert_array_equal(values[:n], row.values[places])
        assert (genes[n:] == vocab.pad_id).all()
        assert (values[n:] == -2).all()


@pytest.mark.parametrize("keys", [None, np.arange(19)])
def test_parity_scgpt_our_crop_has_the_length_of_the_original(tokenized, vocab, keys):
    max_len = int(tokenized["tok_sampled_max_len"])
    whole = encode_original(tokenized, vocab, ValueEncoder(target_sum=None, include_zeros=False))
    encoder = ValueEncoder(max_len=max_len, target_sum=None, include_zeros=False)
    tokens = encode_original(tokenized, vocab, encoder, keys)
    assert tokens.lengths.tolist() == (tokenized["tok_sampled_genes"] != vocab.pad_id).sum(1).tolist()
    assert tokens.lengths.max() == max_len < whole.lengths.max()
    for cell in range(len(tokens)):
        kept, all_of = row_of(tokens, cell), row_of(whole, cell)
        assert kept[0] == (vocab.cls_id, 0)
        assert kept == [token for token in all_of if token in set(kept)]
