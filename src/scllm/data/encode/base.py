"""What encoders have in common: the protocol, cropping, zeros and specials of a sentence."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from scllm._typing import IntArray
from scllm.data.tokens import Tokens
from scllm.data.vocab import Vocab
from scllm.kernels.draws import uniform_entries
from scllm.kernels.ragged import crop_random, crop_top, prepend

__all__ = ["CROP", "TIES", "Encoder", "check_max_len", "sentence"]

# each kind of draw has its own salt, so that ties and crops of one cell are independent
CROP, TIES = 1, 2


class Encoder(Protocol):
    """Turns the counts of cells, restricted to a vocabulary and in the order of its ids, into sentences."""

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

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """Settings that are too long for JSON (gene medians), saved beside the weights."""
        ...

    def __call__(
        self, counts: Tokens, vocab: Vocab, keys: IntArray | None = None, *, measured: IntArray, random_state: int = 0
    ) -> Tokens:
        """Encode. With ``keys`` (one a cell) this is training and draws are a function of the key.

        ``measured`` holds the tokens of the genes that the cells' file has, in rising order: a gene that was not
        measured is not zero.
        """
        ...


def check_max_len(max_len: int) -> None:
    """Raise unless there is room for `<cls>` and a gene."""
    if max_len < 2:
        raise ValueError(
            f"Expected max_len of at least 2 (`<cls>` and one gene), got {max_len}. Pass a larger max_len."
        )


def sentence(
    counts: Tokens,
    values: NDArray[np.float32],
    vocab: Vocab,
    keys: IntArray | None,
    max_len: int,
    cls_value: float | None,
    zeros_of: IntArray | None,
) -> Tokens:
    """Add zeros, crop by the counts (inference) or at random (training), put ``<cls>`` first.

    Tokens rise within a cell, as :meth:`scllm.data.genes.GeneMatch.tokens` hands them out, and stay in that order: of
    equal counts at the edge of a crop those with the lowest token ids are kept. The original scGPT draws which genes
    are kept, so no rule of its own is lost.
    """
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
                sentence.indptr, room, uniform_entries(sentence.indptr, sentence.genes, keys, CROP)
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
