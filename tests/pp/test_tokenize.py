"""Token sequences that pp.tokenize writes for inspection."""

from __future__ import annotations

import numpy as np
import pytest
from messages import naming
from scipy import sparse

from scllm import get, models
from scllm.data.encode import BinEncoder, ValueEncoder
from scllm.data.vocab import Vocab
from scllm.pp import bin_expression, match_genes, tokenize


def test_tokens_are_cls_and_the_expressed_genes_with_their_bins(adata):
    bin_expression(adata)
    tokenize(adata)
    genes, values = get.tokens(adata, length=41)
    for cell, bins in enumerate(adata.layers["binned"].toarray()):
        expressed = np.flatnonzero(bins)
        n = len(expressed) + 1
        assert genes[cell].tolist() == [40, *expressed, *[41] * (41 - n)]
        assert values[cell].tolist() == [0, *bins[expressed], *[-2] * (41 - n)]


def test_layout_is_that_of_the_seed(adata):
    tokenize(adata, encoder=BinEncoder(include_zeros=True))
    genes, values = get.tokens(adata)
    assert genes.shape == values.shape == (60, 41)
    assert (genes == [40, *range(40)]).all()
    np.testing.assert_array_equal(values[:, 1:] > 0, adata.X.toarray() > 0)


@pytest.mark.parametrize("encoder", ["bins", "values", ValueEncoder(include_zeros=False)])
def test_longer_cells_keep_their_highest_values(adata, encoder):
    tokenize(adata, encoder=encoder, max_len=6)
    genes, _ = get.tokens(adata)
    assert genes.shape == (60, 6)
    for row, counts in zip(genes, adata.X.toarray(), strict=True):
        best = sorted(range(40), key=lambda gene: (-counts[gene], gene))[:5]
        assert row[1:].tolist() == sorted(best)


def test_a_model_brings_its_encoder_and_vocabulary(adata):
    class Model:
        vocab = Vocab.from_genes(adata.var_names[::-1])
        encoder = BinEncoder(n_bins=5, cls_value=-2)

    tokenize(adata, model=Model())
    genes, values = get.tokens(adata)
    assert (genes[:, 0] == 40).all()
    assert (values[:, 0] == -2).all()
    assert set(values[genes < 40]) == {1, 2, 3, 4}
    first = np.flatnonzero(adata.X[0].toarray()[0])
    assert genes[0, 1 : len(first) + 1].tolist() == sorted(39 - first)


def test_vocabulary_specials_and_settings_are_recorded(adata):
    tokenize(adata, key_added="mine", max_len=9)
    entry = adata.uns["scllm"]["tokenize"]
    assert entry["table"]["token"].tolist() == [*adata.var_names, "<cls>", "<pad>", "<mask>"]
    assert list(entry["params"]["specials"]) == ["<cls>", "<pad>", "<mask>"]
    assert entry["params"]["pad_id"] == 41
    assert entry["params"]["encoder"]["max_len"] == 9
    assert get.tokens(adata, key="mine")[0].shape == (60, 9)


def test_an_unknown_encoder_is_an_error(adata):
    with pytest.raises(ValueError, match=naming("encoder", "'bins', 'ranks', 'values'", "got 'ranked'")):
        tokenize(adata, encoder="ranked")
    assert not len(adata.obsm)


def test_a_cell_without_genes_is_cls_alone(adata):
    adata.X = sparse.csr_matrix(adata.X.multiply((np.arange(60) != 7)[:, None]))
    with pytest.warns(UserWarning, match=naming("1 of 60 cells", "<cls>")):
        tokenize(adata)
    genes, _ = get.tokens(adata)
    assert genes[7].tolist() == [40] + [41] * (genes.shape[1] - 1)


def test_a_copy_leaves_the_original_alone(adata):
    changed = tokenize(adata, copy=True)
    assert set(changed.obsm) == {"tokens", "tokens_values"}
    assert not len(adata.obsm)
    assert "scllm" not in adata.uns


def test_values_of_an_earlier_call_do_not_stay_beside_ranks(adata):
    tokenize(adata)
    tokenize(adata, encoder="ranks")
    assert get.tokens(adata)[1] is None


def test_without_a_vocabulary_all_genes_are_read_whatever_they_were_matched_by(adata):
    adata.var["symbol"] = [f"S{i}" for i in range(40)]
    match_genes(adata, list(adata.var["symbol"]), gene_key="symbol")
    tokenize(adata)
    lengths = np.diff(adata.obsm["tokens"].indptr)
    np.testing.assert_array_equal(lengths, 1 + (adata.X > 0).sum(1).A1)


def test_cells_without_a_known_gene_are_counted(adata):
    n_empty = int((adata.X[:, :5].toarray() == 0).all(1).sum())
    with pytest.warns(UserWarning, match=naming(f"{n_empty} of 60 cells", "<cls>")):
        tokenize(adata, vocab=Vocab.from_genes(adata.var_names[:5]))


def test_a_list_of_names_says_what_to_pass(adata):
    with pytest.raises(TypeError, match=naming("vocab", "got list", "Vocab.from_genes(names)")):
        tokenize(adata, vocab=list(adata.var_names))


def test_a_model_on_a_path_encodes_as_the_model_itself(adata, tmp_path):
    model = models.build("scbert", vocab=adata.var_names[:30], size="tiny", n_layers=1)
    model.save(tmp_path / "model")
    tokenize(adata, model=model)
    for number, path in enumerate((tmp_path / "model", str(tmp_path / "model"))):
        tokenize(adata, model=path, key_added=f"from path {number}")
        for name in ("", "_values"):
            assert (adata.obsm[f"from path {number}{name}"] != adata.obsm[f"tokens{name}"]).nnz == 0
    with pytest.raises(FileNotFoundError, match="nowhere"):
        tokenize(adata, model="nowhere")
