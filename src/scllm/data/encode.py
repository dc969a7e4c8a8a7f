"""Encoders: counts of a cell become the sentence a model reads. They are saved with the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from scllm._typing import IntArray
from scllm.data.tokens import Tokens
from scllm.data.vocab import Vocab
from scllm.kernels.binning import bin_rows
from scllm.kernels.draws import row_keys, uniform_entries
from scllm.kernels.ragged import crop_random, crop_top, prepend

__all__ = ["BinEncoder", "Encoder", "Ties", "ValueEncoder", "encoder_from_dict", "encoder_to_dict"]

Ties = Literal["middle", "left", "right", "random"]

# each kind of draw has its own salt, so that ties and crops of one cell are independent
_CROP, _TIES = 1, 2


class Encoder(Protocol):
    """Turns the counts of cells, restricted to a vocabulary, into sentences."""

    @property
    def max_len(self) -> int:
        """Longest sentence, specials included."""
        ...

    @property
    def n_specials(self) -> int:
        """Special tokens that every sentence has."""
        ...

    @property
    def needs_counts(self) -> bool:
        """Whether the encoder reads raw counts only."""
        ...

    def __call__(
        self, counts: Tokens, vocab: Vocab, keys: IntArray | None = None, *, measured: IntArray, random_state: int = 0
    ) -> Tokens:
        """Encode. With ``keys`` (one a cell) this is training and draws are a function of the key.

        ``measured`` holds the tokens of the genes that the data have: a gene that was not measured is not zero.
        """
        ...


@dataclass(frozen=True)
class BinEncoder:
    """Bins of each cell's expressed genes, as scGPT reads them (Cui et al., Nat. Methods 2024).

    Parameters
    ----------
    n_bins
        Number of bins, the zero bin included.
    max_len
        Longest sentence, ``<cls>`` included. Longer cells keep their highest values, in training a random subset.
    ties
        Which of several possible bins a value gets, see :func:`scllm.pp.bin_expression`.
    cls_value
        Value that stands beside ``<cls>``.
    include_zeros
        Whether genes without a count are part of the sentence (bin 0).
    """

    n_bins: int = 51
    max_len: int = 1201
    ties: Ties = "middle"
    cls_value: float = 0
    include_zeros: bool = False

    def __post_init__(self) -> None:
        check_n_bins(self.n_bins)
        check_ties(self.ties)
        _check_max_len(self.max_len)

    @property
    def n_specials(self) -> int:
        """``<cls>``."""
        return 1

    @property
    def needs_counts(self) -> bool:
        """Bins of counts, normalised and logged values are the same."""
        return False

    def __call__(
        self, counts: Tokens, vocab: Vocab, keys: IntArray | None = None, *, measured: IntArray, random_state: int = 0
    ) -> Tokens:
        """Bin over all genes of the vocabulary, crop, and put ``<cls>`` first."""
        draws = tie_draws(counts, keys, random_state) if self.ties == "random" else None
        dtype = np.uint8 if self.n_bins <= 256 else np.uint16
        bins = bin_rows(
            counts.indptr, np.asarray(counts.values), n_bins=self.n_bins, ties=self.ties, draws=draws, dtype=dtype
        ).astype(np.float32)
        zeros_of = measured if self.include_zeros else None
        return _sentence(counts, bins, vocab, keys, self.max_len, self.cls_value, zeros_of)


@dataclass(frozen=True)
class ValueEncoder:
    """Log-normalised expression: ``log1p(count / total * target_sum)``, total over the genes of the vocabulary.

    Parameters
    ----------
    max_len
        Longest sentence, specials included. Longer cells keep their highest values, in training a random subset.
    target_sum
        Counts that each cell is scaled to; ``None`` leaves the counts as they are, without logarithm.
    cls_value
        Value that stands beside ``<cls>``; ``None`` for sentences without ``<cls>``.
    include_zeros
        Whether genes without a count are part of the sentence.
    """

    max_len: int = 20_000
    target_sum: float | None = 1e4
    cls_value: float | None = 0
    include_zeros: bool = True

    def __post_init__(self) -> None:
        _check_max_len(self.max_len)

    @property
    def n_specials(self) -> int:
        """``<cls>``, where there is one."""
        return int(self.cls_value is not None)

    @property
    def needs_counts(self) -> bool:
        """Normalisation starts from raw counts."""
        return True

    def __call__(
        self, counts: Tokens, vocab: Vocab, keys: IntArray | None = None, *, measured: IntArray, random_state: int = 0
    ) -> Tokens:
        """Normalise, crop, and put ``<cls>`` first."""
        del random_state  # nothing is drawn at inference
        values = np.asarray(counts.values, np.float32)
        if self.target_sum is not None:
            cell = np.repeat(np.arange(len(counts)), counts.lengths)
            totals = np.bincount(cell, weights=values, minlength=len(counts))
            values = np.log1p(values * (self.target_sum / totals[cell])).astype(np.float32)
        zeros_of = measured if self.include_zeros else None
        return _sentence(counts, values, vocab, keys, self.max_len, self.cls_value, zeros_of)


def check_n_bins(n_bins: int) -> None:
    """Raise unless there is room for the zero bin and at least one more."""
    if not 2 <= n_bins <= 65_536:
        raise ValueError(
            f"n_bins is {n_bins}, at least 2 (the zero bin and one more) and at most 65536 expected. scGPT uses "
            "n_bins=51."
        )


def check_ties(ties: str) -> None:
    """Raise unless ``ties`` is one of the four rules."""
    if ties not in get_args(Ties):
        raise ValueError(f"ties is {ties!r}, one of {get_args(Ties)} expected. Use 'middle' for the least noise.")


def tie_draws(counts: Tokens, keys: IntArray | None, random_state: int) -> NDArray[np.float64]:
    """One uniform draw a token; at inference keyed by the seed and the set of genes that the cell expresses."""
    if keys is None:
        keys = row_keys(counts.indptr, counts.genes, random_state)
    return uniform_entries(counts.indptr, counts.genes, keys, _TIES)


def encoder_to_dict(encoder: Encoder) -> dict[str, Any]:
    """Plain settings of an encoder."""
    return {"kind": type(encoder).__name__, **asdict(encoder)}  # type: ignore[call-overload]


def encoder_from_dict(saved: Mapping[str, Any]) -> Encoder:
    """The encoder that :func:`encoder_to_dict` described."""
    kinds = {kind.__name__: kind for kind in (BinEncoder, ValueEncoder)}
    settings = dict(saved)
    kind = kinds.get(settings.pop("kind", ""))
    if kind is None or set(settings) - {field.name for field in fields(kind)}:
        raise ValueError(
            f"an encoder of this kind is not known: {dict(saved)}, one of {sorted(kinds)} expected. "
            "The model was saved by another version of scllm; update scllm."
        )
    return kind(**settings)


def _check_max_len(max_len: int) -> None:
    if max_len < 2:
        raise ValueError(
            f"max_len is {max_len}, at least 2 expected: it counts `<cls>` and one gene. Pass a larger one."
        )


def _sentence(
    counts: Tokens,
    values: NDArray[np.float32],
    vocab: Vocab,
    keys: IntArray | None,
    max_len: int,
    cls_value: float | None,
    zeros_of: IntArray | None,
) -> Tokens:
    """Add zeros, crop by the counts (inference) or at random (training), put ``<cls>`` first."""
    order = np.asarray(counts.values)
    sentence = Tokens(counts.indptr, counts.genes, values)
    if zeros_of is not None:
        sentence, order = _with_zeros(sentence, order, zeros_of)
    room = max_len - (cls_value is not None)
    if len(sentence) and sentence.lengths.max() > room:
        if keys is None:
            indptr, kept = crop_top(sentence.indptr, order, room)
        else:
            indptr, kept = crop_random(
                sentence.indptr, room, uniform_entries(sentence.indptr, sentence.genes, keys, _CROP)
            )
        sentence = Tokens(indptr, sentence.genes[kept], np.asarray(sentence.values)[kept])
    if cls_value is None:
        return sentence
    indptr, genes = prepend(sentence.indptr, sentence.genes, vocab.cls_id)
    _, with_cls = prepend(sentence.indptr, np.asarray(sentence.values), cls_value)
    return Tokens(indptr, genes, with_cls)


def _with_zeros(sentence: Tokens, order: NDArray[Any], measured: IntArray) -> tuple[Tokens, NDArray[Any]]:
    """Every measured gene in each cell; dense over those genes, for the cells of one read only."""
    place = np.empty(int(measured.max(initial=-1)) + 1, np.int64)
    place[measured] = np.arange(len(measured))
    at = np.repeat(np.arange(len(sentence)), sentence.lengths) * len(measured) + place[sentence.genes]
    values = np.zeros(len(sentence) * len(measured), np.float32)
    values[at] = sentence.values
    full_order = np.zeros(len(values), order.dtype)
    full_order[at] = order
    indptr = np.arange(len(sentence) + 1, dtype=np.int64) * len(measured)
    return Tokens(indptr, np.tile(measured, len(sentence)), values), full_order
