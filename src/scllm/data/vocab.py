"""The vocabulary, which gives each token its id."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from scllm._names import listed
from scllm._typing import IntArray
from scllm.data.dictionaries import read_dictionary, read_whole

__all__ = ["Vocab", "read_tokens"]


@dataclass(frozen=True)
class Vocab:
    """Tokens in the order of their ids: ``tokens[i]`` has id ``i``. Published vocabularies keep their own ids.

    Parameters
    ----------
    tokens
        Gene names and special tokens (in angle brackets) in the order of their ids.
    pad, mask, cls, eos
        Names of the special tokens; ``None`` if the vocabulary has no such token.
    aliases
        Other names of tokens, such as old Ensembl ids, or the symbols of genes that are named by Ensembl ids. An alias
        takes precedence over a token of the same name.

    Examples
    --------
    >>> vocab = Vocab.from_genes(["CD3E", "LYZ"])
    >>> vocab.ids(["LYZ", "unknown", "<cls>"])
    array([ 1, -1,  2], dtype=int32)
    """

    tokens: tuple[str, ...]
    pad: str | None = "<pad>"
    mask: str | None = "<mask>"
    cls: str | None = "<cls>"
    eos: str | None = None
    aliases: Mapping[str, str] = field(default_factory=dict, hash=False, repr=False)

    def __post_init__(self) -> None:
        if len(self._id_of) < len(self.tokens):
            repeated = next(token for i, token in enumerate(self.tokens) if self._id_of[token] != i)
            raise ValueError(
                f"Expected every token of the vocabulary once, got {repeated!r} more than once. Remove the repeats."
            )
        for role in ("pad", "mask", "cls", "eos"):
            token = getattr(self, role)
            if token is not None and token not in self._id_of:
                raise ValueError(
                    f"Expected the {role} token {token!r} in the vocabulary, but it is not among the "
                    f"{len(self.tokens)} tokens. Add it, or pass {role}=None for a vocabulary without one."
                )

    @classmethod
    def from_genes(cls, genes: Iterable[str]) -> Vocab:
        """Give genes the ids 0 to G-1 in the order given, followed by ``<cls>``, ``<pad>`` and ``<mask>``."""
        if isinstance(genes, str):
            raise TypeError(f"Expected genes as a list of gene names, got the string {genes!r}. Pass [{genes!r}].")
        return cls((*map(str, genes), "<cls>", "<pad>", "<mask>"))

    def __len__(self) -> int:
        return len(self.tokens)

    def __contains__(self, token: object) -> bool:
        return token in self._id_of

    def __repr__(self) -> str:
        shown = ", ".join(self.genes[:3])
        specials = " ".join(self.specials)
        return f"Vocab({len(self.genes):,} genes ({shown}, ...), specials {specials})"

    @cached_property
    def _id_of(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    @cached_property
    def specials(self) -> tuple[str, ...]:
        """Tokens that are not genes: those in angle brackets."""
        return tuple(token for token in self.tokens if token.startswith("<") and token.endswith(">"))

    @cached_property
    def genes(self) -> tuple[str, ...]:
        """Tokens that are genes, in id order."""
        specials = set(self.specials)
        return tuple(token for token in self.tokens if token not in specials)

    @property
    def special_ids(self) -> IntArray:
        """Ids of the special tokens."""
        return self.ids(self.specials)

    @property
    def gene_ids(self) -> IntArray:
        """Ids of the genes."""
        return self.ids(self.genes)

    @property
    def pad_id(self) -> int:
        """Id of the padding token."""
        return self._special_id("pad")

    @property
    def cls_id(self) -> int:
        """Id of the token that stands for the whole cell."""
        return self._special_id("cls")

    @property
    def mask_id(self) -> int:
        """Id of the token that hides a gene."""
        return self._special_id("mask")

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a token sequence."""
        return self._special_id("eos")

    def _special_id(self, role: str) -> int:
        token = getattr(self, role)
        if token is None:
            raise ValueError(
                f"Expected a vocabulary with a {role} token, which the model needs, got one whose special tokens are "
                f"{listed(self.specials)}. Name one of them with {role}=, or use the vocabulary that the model was "
                "trained with."
            )
        return self._id_of[token]

    def ids(self, names: Iterable[str]) -> IntArray:
        """Look up the ids of tokens, -1 for names that are not in the vocabulary."""
        id_of = self._id_of
        return np.fromiter((id_of.get(name, -1) for name in names), dtype=np.int32)

    def names(self, ids: Iterable[int]) -> list[str]:
        """Look up the tokens of ids."""
        return [self.tokens[i] for i in ids]

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``vocab.json``."""
        saved = {"tokens": list(self.tokens), "pad": self.pad, "mask": self.mask, "cls": self.cls, "eos": self.eos}
        return {**saved, "aliases": dict(self.aliases)} if self.aliases else saved

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Vocab:
        """Read what :meth:`to_dict` wrote."""
        pad, mask, first, last = (saved.get(role) for role in ("pad", "mask", "cls", "eos"))
        return cls(tuple(saved["tokens"]), pad, mask, first, last, saved.get("aliases", {}))

    @classmethod
    def from_tokens(cls, tokens: Iterable[str]) -> Vocab:
        """Make a vocabulary of exactly these tokens; those with the usual names become its special tokens."""
        tokens = tuple(map(str, tokens))
        there = set(tokens)
        pad, mask, first, last = (token if token in there else None for token in ("<pad>", "<mask>", "<cls>", "<eos>"))
        return cls(tokens, pad, mask, first, last)

    @classmethod
    def read(cls, path: str | PathLike[str]) -> Vocab:
        """Read ``vocab.json``, a dictionary ``{token: id}`` (JSON or pickle), a JSON list, or one name per line.

        Each of them may be compressed (``.gz``).
        """
        path = Path(path)
        content = read_tokens(path)
        return cls.from_dict(content) if isinstance(content, dict) else cls.from_tokens(content)


def read_tokens(path: Path) -> list[str] | dict[str, Any]:
    """Read the tokens of a vocabulary file in the order of their ids, or the dict of a file that scllm wrote."""
    raw = read_whole(path, "a vocabulary")
    if raw[:1] == b"\x80":
        return _in_order(read_dictionary(path), path)
    try:
        text = raw.decode("utf-8-sig")
        if not text.lstrip().startswith(("{", "[")):
            return [line.strip() for line in text.splitlines() if line.strip()]
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"Expected a vocabulary in {path} (JSON, or one name per line), but it cannot be read ({error}). The file "
            "is truncated or damaged: download it again."
        ) from error
    if isinstance(content, list):
        return [str(token) for token in content]
    if isinstance(content.get("tokens"), list):
        return dict(content)
    return _in_order(content, path)


def _in_order(content: Mapping[str, int], path: Path) -> list[str]:
    """Sort the tokens of a ``{token: id}`` dictionary by their ids, which must have no gaps."""
    odd = next((token for token, found in content.items() if not isinstance(found, int)), None)
    if odd is not None:
        raise ValueError(
            f"Expected whole numbers as token ids in {path}, got {content[odd]!r} for {odd!r}. Correct the file."
        )
    tokens = sorted(content, key=content.__getitem__)
    ids = [content[token] for token in tokens]
    if ids != list(range(len(ids))):
        wrong = next(i for i, found in enumerate(ids) if i != found)
        raise ValueError(
            f"Expected ids from 0 to {len(ids) - 1} without gaps or repeats in {path}, got {ids[wrong]!r} "
            f"({tokens[wrong]!r}) in place of {wrong}. Renumber the tokens, or pass the vocabulary that the model was "
            "trained with."
        )
    return tokens
