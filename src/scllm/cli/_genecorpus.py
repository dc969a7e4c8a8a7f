"""``scllm genecorpus``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scllm.cli._app import Debug, Verbose
from scllm.cli._options import DataPaths, Family, GeneKey, Layer, MinCoverage, one_or_all, read_model

if TYPE_CHECKING:
    from scllm.data.tokens import Tokens

__all__ = ["genecorpus"]

_ROWS = 4096


def genecorpus(
    data: DataPaths,
    out: Annotated[Path, typer.Option(help="Folder to create, which pretrain and Hugging Face datasets can read.")],
    model: Annotated[
        str | None,
        typer.Option(help="Geneformer model with the genes, medians and length to use. [default: those of the data]"),
    ] = None,
    family: Family = None,
    column: Annotated[list[str] | None, typer.Option(help="Column of obs to keep; repeat it for several.")] = None,
    layer: Layer = None,
    gene_key: GeneKey = None,
    min_coverage: MinCoverage = None,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Write cells as sequences of ranked genes, in the format of Genecorpus."""
    from dataclasses import replace
    from functools import partial

    import numpy as np

    from scllm._results import match_settings
    from scllm.data import genes
    from scllm.data.checks import check_source, layer_with_counts, read_checked
    from scllm.data.encode import RankEncoder
    from scllm.data.genecorpus import write_genecorpus
    from scllm.data.matching import match_source
    from scllm.data.medians import token_medians
    from scllm.data.source import open_source
    from scllm.models import geneformer

    source = open_source(one_or_all(data), layer=layer)
    hint = partial(layer_with_counts, one_or_all(data), layer)
    check_source(source, needs_counts=True, layer=layer, hint=hint)
    if model is None:
        config = geneformer.Config()
        (names,) = genes.name_columns(source.genes, source.var, gene_key or "var_names").values()
        vocab, encoder = config.vocab(dict.fromkeys(genes.strip_version(names))), config.encoder()
    else:
        chosen = read_model(model, family)
        vocab, encoder = chosen.vocab, chosen.encoder
    if not isinstance(encoder, RankEncoder):
        raise ValueError(f"Expected a geneformer model, but {model} does not rank genes. Leave --model out.")
    match = match_source(source, vocab, **match_settings(None, gene_key, min_coverage))
    if encoder.medians is None:
        encoder = replace(encoder, medians=token_medians(source, match, np.arange(source.n_obs), len(vocab)))
    medians = encoder.medians

    def sequences() -> Iterator[Tokens]:
        for start in range(0, source.n_obs, _ROWS):
            rows = np.arange(start, min(start + _ROWS, source.n_obs))
            counts = match.tokens(read_checked(source, rows), rows)
            yield encoder(counts, vocab, measured=match.measured)

    write_genecorpus(sequences(), out, vocab=vocab, medians=medians, obs=source.obs(column or []))
    typer.echo(f"{source.n_obs:,} cells written to {out}")
