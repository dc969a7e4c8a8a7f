"""Print how many genes of each data set are in published vocabularies: ``python -m benchmarks.coverage_table``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from anndata import AnnData, read_h5ad

from benchmarks._cells import SHARED
from scllm import pp
from scllm.data.dictionaries import read_dictionary
from scllm.data.vocab import Vocab

__all__ = ["VOCABULARIES", "coverage"]

GENEFORMER, SYMBOLS = "geneformer_v1_token_dictionary.json.gz", "geneformer_v1_gene_name_to_ensembl.json.gz"
VOCABULARIES = {
    "scGPT": "scgpt_default_census_vocab.json.gz",
    "Geneformer V1": GENEFORMER,
    "the same by symbol": GENEFORMER,
    "scFoundation": "scfoundation_gene_list_19264.json.gz",
}


def coverage(adata: AnnData, vocab: Vocab) -> tuple[int, float, float]:
    """Count the data's genes in a vocabulary; return number, share of the smaller set, and share of all counts."""
    # var_names of all data sets are symbols; min_coverage=0 avoids the error about low coverage
    key = "var_names" if vocab.aliases else None
    matched = pp.match_genes(adata, vocab, gene_key=key, min_coverage=0.0, copy=True)
    found, known = matched.uns["scllm"]["match_genes"], (matched.var["token_id"] >= 0).to_numpy()
    return int(found["n_matched"]), float(found["coverage"]), float(adata.X[:, known].sum() / adata.X.sum())


def main() -> None:
    vocabs = {name: Vocab.read(SHARED / "dictionaries" / file) for name, file in VOCABULARIES.items()}
    ids = read_dictionary(SHARED / "dictionaries" / SYMBOLS)
    known = {symbol: gene for symbol, gene in ids.items() if gene in vocabs["Geneformer V1"]}
    vocabs["the same by symbol"] = replace(vocabs["the same by symbol"], aliases=known)
    sizes = {name: f"{len(vocab.aliases or vocab.genes):,}" for name, vocab in vocabs.items()}
    print(_line(["data", "genes", *(f"{name} ({n} genes)" for name, n in sizes.items())]))
    print(_line(["---", *["---:"] * (1 + len(vocabs))]))
    for path in sorted(SHARED.rglob("*.h5ad")):
        print(_row(path, vocabs.values()), flush=True)


def _row(path: Path, vocabs: Iterable[Vocab]) -> str:
    adata = read_h5ad(path)
    found = (coverage(adata, vocab) for vocab in vocabs)
    name = path.relative_to(SHARED).with_suffix("").as_posix()
    return _line(
        [f"`{name}`", f"{adata.n_vars:,}", *(f"{n:,} ({100 * a:.1f} %), {100 * b:.1f} %" for n, a, b in found)]
    )


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
