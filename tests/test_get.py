"""Tokens as padded arrays."""

from __future__ import annotations

import numpy as np
import pytest
from messages import naming

import scllm
from scllm import get, pp
from scllm.get import tokens
from scllm.models import Vocab


def rows_slowly(adata, key, width, fill):
    """Each sentence as a list, filled up or cut."""
    matrix = adata.obsm[key]
    cells = [matrix.data[begin:end].tolist() for begin, end in zip(matrix.indptr, matrix.indptr[1:], strict=False)]
    return [cell[:width] + [fill] * (width - len(cell)) for cell in cells]


@pytest.mark.parametrize("length", [None, 1, 7, 60])
def test_sentences_are_filled_up_or_cut_at_the_end(adata, length):
    scllm.pp.tokenize(adata)
    genes, values = tokens(adata, length=length, pad_value=-9)
    width = length or adata.obsm["tokens"].shape[1]
    assert genes.tolist() == rows_slowly(adata, "tokens", width, 41)
    assert values.tolist() == rows_slowly(adata, "tokens_values", width, -9)
    assert values.dtype == np.float32


def test_the_first_gene_and_its_zero_are_no_padding(adata):
    scllm.pp.tokenize(adata, encoder=scllm.models.BinEncoder(include_zeros=True))
    genes, values = tokens(adata)
    assert (genes[:, 1] == 0).all()  # gene_0 has the id 0
    np.testing.assert_array_equal(values[:, 1] == 0, adata.X[:, 0].toarray().ravel() == 0)


def test_tokens_go_with_their_cells(adata):
    scllm.pp.tokenize(adata, key_added="mine")
    order = np.random.default_rng(0).permutation(60)[:25]
    for whole, part in zip(
        tokens(adata, key="mine"), tokens(adata[order].copy(), key="mine", length=None), strict=True
    ):
        np.testing.assert_array_equal(part, whole[order, : part.shape[1]])


def test_missing_tokens_say_what_to_call(adata):
    with pytest.raises(KeyError, match=r"'tokenize' is not in adata\.uns\['scllm'\].*Call pp\.tokenize first"):
        tokens(adata)
    scllm.pp.tokenize(adata)
    with pytest.raises(KeyError, match=r"'token' is not in adata\.obsm\. Did you mean 'tokens'"):
        tokens(adata, key="token")


def test_the_padding_of_another_vocabulary_is_never_taken(adata):
    pp.tokenize(adata, key_added="first")
    pp.tokenize(adata, vocab=Vocab.from_genes(adata.var_names[:20]), key_added="second")
    with pytest.raises(ValueError, match=naming("key_added='first'", "'second'")):
        get.tokens(adata, key="first")
    assert get.tokens(adata, key="second")[0].shape[0] == adata.n_obs
