"""``scllm embed`` and ``scllm classify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scllm import _keys
from scllm.cli._app import Debug, Verbose
from scllm.cli._options import (
    CellsAtOnce,
    Device,
    Family,
    GeneKey,
    Layer,
    MinCoverage,
    ModelPath,
    Precision,
    WrittenData,
    one_or_all,
    read_model,
)

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["classify", "embed"]


def embed(
    data: WrittenData,
    model: ModelPath,
    out: Annotated[
        Path,
        typer.Option(help="Output file: .npy or .zarr (streamed), or .h5ad (a copy of the data with it in obsm)."),
    ],
    family: Family = None,
    pooling: Annotated[
        str | None,
        typer.Option(
            help="cls; mean, max, ranked or linear (rank-weighted means) over genes; all (scfoundation). [default: "
            "that of the family]"
        ),
    ] = None,
    hidden_layer: Annotated[
        int, typer.Option(help="Block whose output is pooled: -1 is the last, -2 the one before.")
    ] = -1,
    layer: Layer = None,
    gene_key: GeneKey = None,
    min_coverage: MinCoverage = None,
    key_added: Annotated[str, typer.Option(help="Key in obsm, if --out is an .h5ad.")] = "X_scllm",
    batch_size: CellsAtOnce = None,
    device: Device = "auto",
    n_gpus: Annotated[int, typer.Option(help="Number of GPUs that share the cells.")] = 1,
    precision: Precision = "auto",
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Embed cells."""
    from scllm import tl
    from scllm.data.row_file import own_share

    _check_ending(out, (".npy", ".zarr", ".h5ad"))
    share = own_share()
    if out.suffix == ".h5ad" and share.world > 1:
        raise ValueError(
            f"Expected --out to end in .npy or .zarr, which several processes can write together, got '{out}' with "
            f"WORLD_SIZE={share.world}. Change the extension, or start one process."
        )
    options = {
        "pooling": pooling,
        "hidden_layer": hidden_layer,
        "layer": layer,
        "gene_key": gene_key,
        "min_coverage": min_coverage,
        "key_added": key_added,
        "batch_size": batch_size,
        "device": device,
        "n_gpus": n_gpus,
        "precision": precision,
    }
    if out.suffix == ".h5ad":
        adata = _read(data, out)
        tl.embed(adata, read_model(model, family), **options)
        _write(adata, out)
    else:
        tl.embed(one_or_all(data), read_model(model, family), out=out, **options)
    typer.echo(f"embedding written to {out}" if share.world == 1 else f"part {share.rank} of {share.world} is written")


def classify(
    data: WrittenData,
    model: ModelPath,
    out: Annotated[Path, typer.Option(help="Output file: .csv (one row per cell), or .h5ad (a copy of the data).")],
    family: Family = None,
    key_added: Annotated[
        str, typer.Option(help="Column to write; with several heads, _<key> is appended.")
    ] = "scllm_label",
    unknown: Annotated[
        str | None,
        typer.Option(help="How cells of unseen types are found, to be labelled unknown: probability or distance."),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Lowest probability (--unknown distance: largest distance) of a cell of a known type."),
    ] = None,
    fpr: Annotated[
        float | None,
        typer.Option(
            help="With --unknown, instead of --threshold: share of the cells of known types that may be labelled "
            "unknown. [default: 0.05]"
        ),
    ] = None,
    layer: Layer = None,
    gene_key: GeneKey = None,
    min_coverage: MinCoverage = None,
    batch_size: CellsAtOnce = None,
    device: Device = "auto",
    precision: Precision = "auto",
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Label cells with a fine-tuned model."""
    from scllm import tl
    from scllm.tl._classify import columns_of_heads

    _check_ending(out, (".csv", ".h5ad"))
    adata = _read(data, out, backed=out.suffix == ".csv")
    chosen = read_model(model, family)
    tl.classify(
        adata,
        chosen,
        key_added=key_added,
        unknown=unknown,  # type: ignore[arg-type]
        threshold=threshold,
        fpr=fpr,
        layer=layer,
        gene_key=gene_key,
        min_coverage=min_coverage,
        batch_size=batch_size,
        device=device,
        precision=precision,  # type: ignore[arg-type]
    )
    if out.suffix == ".h5ad":
        _write(adata, out)
    else:
        scores = ("", _keys.PROBABILITY, *([_keys.DISTANCE] if unknown == "distance" else []))
        named = [name + more for name in columns_of_heads(chosen, key_added) for more in scores]
        adata.obs[[name for name in named if name in adata.obs]].to_csv(out, index_label="cell")
    typer.echo(f"labels of {adata.n_obs:,} cells written to {out}")


def _check_ending(out: Path, endings: tuple[str, ...]) -> None:
    """Check the extension and the folder of the output file before the slow part."""
    if out.suffix not in endings:
        raise ValueError(f"Expected --out to end in {' or '.join(endings)}, got '{out}'. Change the extension.")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"The folder of --out '{out}' does not exist. Create it, or choose another one.")


def _write(adata: AnnData, out: Path) -> None:
    """Write the data; ``out`` may be the file that was read."""
    from scllm.data.replace import replaced_when_whole

    with replaced_when_whole(out) as fresh:
        adata.write_h5ad(fresh)


def _read(paths: list[str], out: Path, *, backed: bool = False) -> AnnData:
    """Read the data as an AnnData; with ``backed``, the matrix of a single .h5ad stays on disk."""
    import anndata as ad

    from scllm.data.soma import is_soma
    from scllm.data.source import files_in, open_source

    files: list[Path] = []
    for path in paths:
        open_source(path)  # raises if scllm cannot read the path
        inside = [] if is_soma(path) else files_in(Path(path))
        if not inside or any(is_soma(file) for file in inside):
            raise ValueError(
                f"Expected .h5ad or .zarr files in '{path}', which --out .h5ad and labels need. Pass such files, or "
                "--out .npy or .zarr."
            )
        files += inside
    if len(files) > 1 and out.resolve() in [file.resolve() for file in files]:
        raise ValueError(
            f"--out '{out}' is one of the {len(files)} input files and would be replaced by the cells of all of them. "
            "Choose another path."
        )
    if backed and len(files) == 1 and files[0].suffix == ".h5ad":
        return ad.read_h5ad(files[0], backed="r")
    read = [ad.read_zarr(file) if file.is_dir() else ad.read_h5ad(file) for file in files]
    return read[0] if len(read) == 1 else _united(read)


def _united(parts: list[AnnData]) -> AnnData:
    """Join the data over the union of genes; cell names that several files share get the number of their file."""
    import anndata as ad
    import pandas as pd

    from scllm._log import warn

    layers = set.union(*(set(part.layers) for part in parts))
    for name in sorted(layers - set.intersection(*(set(part.layers) for part in parts))):
        # zeros for the cells of a file would look like counts
        warn(f"Layer {name!r} is not in all {len(parts)} files and is left out of the output.")
        for part in parts:
            part.layers.pop(name, None)
    n_files = pd.Series([name for part in parts for name in part.obs_names.unique()]).value_counts()
    for number, part in enumerate(parts):
        part.obs_names = [f"{name}-{number}" if n_files[name] > 1 else name for name in part.obs_names]
    united = ad.concat(parts, join="outer", merge="first", fill_value=0)
    # an embedding that a file lacks is missing, unlike a gene that it lacks, which is zero
    described = [ad.AnnData(obs=part.obs[[]], obsm=dict(part.obsm)) for part in parts]
    united.obsm = ad.concat(described, join="outer").obsm
    return united
