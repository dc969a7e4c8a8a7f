"""Matching the genes of a source to a vocabulary, file by file."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from scllm.data.cells import CellSource, gene_tables
from scllm.data.genes import GeneMatch, match
from scllm.data.vocab import Vocab

__all__ = ["match_source"]


def match_source(
    source: CellSource, vocab: Vocab, *, gene_key: str | None = None, min_coverage: float = 0.3
) -> GeneMatch:
    """Find the token of each gene of a source, as :func:`scllm.data.genes.match` does.

    If a source consists of files with different genes or gene tables, each file is matched on its own. Therefore the
    tokens of a cell do not depend on which other files are read with it.
    """
    tables = gene_tables(source)
    if len(tables.tables) == 1:
        return match(source.genes, vocab, var=source.var, gene_key=gene_key, min_coverage=min_coverage)
    files = []
    for name, var in zip(tables.names, tables.tables, strict=True):
        try:
            found = match(var.index, vocab, var=var, gene_key=gene_key, min_coverage=min_coverage)
        except (KeyError, ValueError) as error:
            error.add_note(f"This is about the genes of {name}.")
            raise
        token_ids = np.full(len(source.genes), -1, np.int32)
        token_ids[source.genes.get_indexer(var.index)] = found.token_ids
        files.append(replace(found, token_ids=token_ids))
    # different tables may still give the same tokens
    _, first, kind = np.unique([file.token_ids for file in files], axis=0, return_index=True, return_inverse=True)
    if len(first) == 1:
        return files[0]
    token_ids = np.max([file.token_ids for file in files], axis=0)
    return replace(
        files[0], token_ids=token_ids, files=tuple(files[i] for i in first), file_of=kind.ravel()[tables.of_cell]
    )
