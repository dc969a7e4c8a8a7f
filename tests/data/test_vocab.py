"""Token <-> id, and the files that hold vocabularies."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from messages import naming

from scllm.data.vocab import Vocab

names = st.lists(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1), unique=True, max_size=8)


@given(names)
def test_genes_come_first_then_cls_pad_and_mask(genes):
    vocab = Vocab.from_genes(genes)
    assert vocab.ids(genes).tolist() == list(range(len(genes)))
    assert [vocab.cls_id, vocab.pad_id, vocab.mask_id] == [len(genes), len(genes) + 1, len(genes) + 2]
    assert vocab.genes == tuple(genes)
    assert vocab.gene_ids.tolist() == list(range(len(genes)))
    assert sorted(vocab.special_ids) == list(range(len(genes), len(genes) + 3))


@given(names)
def test_ids_and_names_are_inverse_and_unknown_is_minus_one(genes):
    vocab = Vocab.from_genes(genes)
    assert vocab.names(vocab.ids(vocab.tokens)) == list(vocab.tokens)
    ids = vocab.ids(["?", *genes])
    assert ids.dtype == np.int32
    assert ids[0] == -1
    assert "?" not in vocab
    assert all(gene in vocab for gene in genes)


@given(names)
def test_what_was_written_reads_back(genes):
    vocab = Vocab.from_genes(genes)
    assert Vocab.from_dict(json.loads(json.dumps(vocab.to_dict()))) == vocab


@pytest.mark.parametrize("form", ["ours", "dictionary", "list", "lines", "gzip"])
def test_every_kind_of_file_gives_the_same_ids(tmp_path, form):
    tokens = ["<pad>", "TP53", "MYC", "<cls>"]
    path = tmp_path / "vocab.json"
    match form:
        case "ours":
            path.write_text(json.dumps(Vocab.from_tokens(tokens).to_dict()))
        case "dictionary":  # order in the file does not count
            path.write_text(json.dumps({token: i for i, token in reversed(list(enumerate(tokens)))}))
        case "list":
            path.write_text(json.dumps(tokens))
        case "lines":
            path.write_text("\n".join(tokens) + "\n")
        case "gzip":
            path.write_bytes(gzip.compress("\n".join(tokens).encode()))
    vocab = Vocab.read(path)
    assert vocab.tokens == tuple(tokens)
    assert (vocab.pad, vocab.cls, vocab.mask, vocab.eos) == ("<pad>", "<cls>", None, None)
    assert vocab.genes == ("TP53", "MYC")


@pytest.mark.parametrize(("ids", "wrong"), [((0, 2), "'b'"), ((1, 2), "'a'"), ((0, 0), "'b'")])
def test_ids_with_gaps_or_repeats_are_an_error(tmp_path, ids, wrong):
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps(dict(zip("ab", ids, strict=True))))
    with pytest.raises(ValueError, match=naming("vocab.json", 0, 1, wrong)):
        Vocab.read(path)


def test_a_repeated_token_is_named():
    with pytest.raises(ValueError, match=naming("got 'b' more than once")):
        Vocab.from_genes(["a", "b", "b"])


def test_a_role_without_its_token_is_an_error():
    with pytest.raises(ValueError, match=naming("pad token '<pad>'", 2, "pad=None")):
        Vocab(("a", "<cls>"))
    vocab = Vocab.from_tokens(["a", "<cls>"])
    with pytest.raises(ValueError, match=naming("pad token", "'<cls>'", "pad=")):
        _ = vocab.pad_id


def test_published_vocabularies_keep_their_own_ids(shared):
    path = shared / "parity" / "scgpt" / "checkpoint" / "vocab.json"
    given_ids = json.loads(path.read_text())
    vocab = Vocab.read(path)
    assert {token: int(i) for token, i in zip(vocab.tokens, vocab.ids(vocab.tokens), strict=True)} == given_ids
    assert vocab.pad_id == given_ids["<pad>"]


def test_files_with_fewer_or_odd_entries(tmp_path):
    file = tmp_path / "vocab.json"
    file.write_text(json.dumps({"tokens": ["a", "b"]}))
    assert (Vocab.read(file).tokens, Vocab.read(file).pad) == (("a", "b"), None)
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(["a", "b"]).encode())
    assert Vocab.read(file).tokens == ("a", "b")
    file.write_text(json.dumps({"a": "x", "b": 1}))
    with pytest.raises(ValueError, match=naming("vocab.json", "got 'x' for 'a'")):
        Vocab.read(file)
