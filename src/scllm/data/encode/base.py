"""What encoders share: the protocol, and truncation, zeros and special tokens of a token sequence."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from scllm._typing import IntArray
from scllm.data.tokens import Tokens
from scllm.data.vocab import Vocab
from scllm.kernels.draws import uniform_entries
from scllm.kernels.ragged import crop_random, crop_top, prepend

__all__ = ["CROP", "TIES", "Encoder", "check_max_len", "token_sequence"]

# each kind of random draw has its own salt, so that ties and the truncation of a cell are independent
CROP, TIES = 1, 2


class Encoder(Protocol):
    """Encodes the counts of cells as token sequences; genes are those of a vocabulary, in the order of its ids."""

    @property
    def max_len(self) -> int:
        """Longest token sequence, special tokens included."""
        ...

    @property
    def n_specials(self) -> int:
        """Number of special tokens in every token sequence."""
        ...

    @property
    def needs_counts(self) -> bool:
        """Whether the encoder needs raw counts."""
        ...

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """Settings that are too long for JSON (gene medians), saved beside the weights."""
        ...

    def __call__(
        self, counts: Tokens, vocab: Vocab, keys: IntArray | None = None, *, measured: IntArray, random_state: int = 0
    ) -> Tokens:
        """Encode cells. ``keys`` (one per cell) are given in training, and seed the random draws of each cell.

        ``measured`` holds the tokens of the genes that the cells' file measured, in ascending order, because a gene
        that was not measured is not zero.
        """
        ...


def check_max_len(max_len: int) -> None:
    """Raise ``ValueError`` unless there is room for `<cls>` and one gene."""
    if max_len < 2:
        raise ValueError(
            f"Expected max_len of at least 2 (`<cls>` and one gene), got {max_len}. Pass a larger max_len."
        )


def token_sequence(
    counts: Tokens,
    values: NDArray[np.float32],
    vocab: Vocab,
    keys: IntArray | None,
    max_len: int,
    cls_value: float | None,
    zeros_of: IntArray | None,
) -> Tokens:
    """Add zeros, truncate by the counts (inference) or at random (training), and put ``<cls>`` first.

    Token ids are ascending within a cell, as :meth:`scllm.data.genes.GeneMatch.tokens` returns them, and stay so. If
    truncation has to choose among equal counts, it keeps the lowest token ids. The original scGPT always keeps a random
    subset, so there is no original rule to follow.
    """
    order = np.asarray(counts.values)
    sequence = Tokens(counts.indptr, counts.genes, values)
    if zeros_of is not None:
        sequence, order = _with_zeros(sequence, order, zeros_of)
    room = max_len - (cls_value is not None)
    if len(sequence) and sequence.lengths.max() > room:
        if keys is None:
            indptr, kept = crop_top(sequence.indptr, order, room)
        else:
            indptr, kept = crop_random(
                sequence.indptr, room, uniform_entries(sequence.indptr, sequence.genes, keys, CROP)
            )
        sequence = Tokens(indptr, sequence.genes[kept], np.asarray(sequence.values)[kept])
    if cls_value is None:
        return sequence
    indptr, genes = prepend(sequence.indptr, sequence.genes, vocab.cls_id)
    _, with_cls = prepend(sequence.indptr, np.asarray(sequence.values), cls_value)
    return Tokens(indptr, genes, with_cls)


def _with_zeros(sequence: Tokens, order: NDArray[Any], measured: IntArray) -> tuple[Tokens, NDArray[Any]]:
    """Add every measured gene to each cell; this is dense over those genes, but only for the cells of one read."""
    place = np.empty(int(measured.max(initial=-1)) + 1, np.int64)
    place[measured] = np.arange(len(measured))
    at = np.repeat(np.arange(len(sequence)), sequence.lengths) * len(measured) + place[sequence.genes]
    values = np.zeros(len(sequence) * len(measured), np.float32)
    values[at] = sequence.values
    full_order = np.zeros(len(values), order.dtype)
    full_order[at] = order
    indptr = np.arange(len(sequence) + 1, dtype=np.int64) * len(measured)
    return Tokens(indptr, np.tile(measured, len(sequence)), values), full_order
