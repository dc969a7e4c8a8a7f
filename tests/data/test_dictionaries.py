"""Dictionaries in every form in which they are published."""

from __future__ import annotations

import collections
import gzip
import json
import pickle

import numpy as np
import pytest
from messages import naming

from scllm.data.dictionaries import read_dictionary
from scllm.data.vocab import Vocab

TOKENS = {"<pad>": 0, "<mask>": 1, "ENSG00000000003": 2}


def write(path, content):
    raw = pickle.dumps(content) if ".pkl" in path.name else json.dumps(content).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.pkl", "a.pkl.gz"])
def test_every_form_gives_the_same(tmp_path, name):
    file = write(tmp_path / name, TOKENS)
    assert read_dictionary(file) == TOKENS
    assert Vocab.read(file) == Vocab.from_tokens(TOKENS)


@pytest.mark.parametrize("kind", [np.int16, np.float64])
def test_numpy_numbers_are_plain_numbers(tmp_path, kind):
    found = read_dictionary(write(tmp_path / "a.pkl", collections.OrderedDict(a=kind(3), b=kind(4))))
    assert found == {"a": 3, "b": 4}
    assert {type(value) for value in found.values()} <= {int, float}


@pytest.mark.parametrize("content", [{"a": print}, {"a": collections.Counter("aa")}, {"a": np.arange(3)}])
def test_anything_else_in_a_pickle_is_an_error_and_is_not_run(tmp_path, content):
    with pytest.raises(ValueError, match=naming("a.pkl", "code", "never executed")):
        read_dictionary(write(tmp_path / "a.pkl", content))


@pytest.mark.parametrize("raw", [b"version https://git-lfs.github.com/spec/v1", b"", b"\x80\x04}", b"[1]"])
def test_files_that_are_no_dictionary_are_an_error(tmp_path, raw):
    (tmp_path / "a.pkl").write_bytes(raw)
    with pytest.raises(ValueError, match=naming("dictionary", "a.pkl")):
        read_dictionary(tmp_path / "a.pkl")


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize("read", [read_dictionary, Vocab.read])
@pytest.mark.parametrize(
    ("raw", "seen", "advice"),
    [
        (cut(gzip.compress(json.dumps(TOKENS).encode())), "gzip", "again"),
        (gzip.compress(b"{}" * 99)[:-9] + b"\xff" * 9, "gzip", "again"),
        (cut(json.dumps(TOKENS).encode()), "cannot be read", "again"),
        (b"{\xff\xfe}", "cannot be read", "again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 99\n", "git-lfs pointer", "git lfs pull"),
    ],
    ids=["truncated gzip", "damaged gzip", "truncated JSON", "no text", "git-lfs"],
)
def test_a_damaged_file_says_what_was_seen_and_what_to_do(tmp_path, read, raw, seen, advice):
    (tmp_path / "a.json").write_bytes(raw)
    with pytest.raises(ValueError, match=naming("a.json", seen, advice)):
        read(tmp_path / "a.json")


def test_a_vocabulary_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=naming("a.json", "vocabulary", "path")):
        Vocab.read(tmp_path / "a.json")


def test_the_published_dictionaries_fit_together(shared):
    folder = shared / "data" / "dictionaries"
    vocab = Vocab.read(folder / "geneformer_v1_token_dictionary.json.gz")
    medians = read_dictionary(folder / "geneformer_v1_gene_median.json.gz")
    assert set(medians) == set(vocab.genes)
    assert (vocab.pad_id, vocab.mask_id, vocab.cls, vocab.eos) == (0, 1, None, None)
    assert min(medians.values()) > 0
