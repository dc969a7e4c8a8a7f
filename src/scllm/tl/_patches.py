"""Computing features of image patches with a frozen network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from torch import Tensor, nn

from scllm import _keys, settings
from scllm._checks import check_adata, missing_key
from scllm._log import log, progress
from scllm._results import free_key, record, record_name, recorded
from scllm._typing import FloatArray
from scllm.data.opened import closes_files
from scllm.data.patches import PatchReader
from scllm.data.spots import sections_of
from scllm.engine.device import resolve_device
from scllm.models.image_encoders import image_encoder

__all__ = ["embed_patches", "patch_reader"]

Encoder = Callable[[Tensor], Any]


@closes_files
def embed_patches(
    adata: AnnData,
    *,
    encoder: str | PathLike[str] | Encoder = "resnet18",
    pretrained: bool = True,
    key_added: str = _keys.PATCH_FEATURES,
    batch_size: int = 64,
    device: str = "auto",
    random_state: int = 0,
    copy: bool = False,
) -> AnnData | None:
    """Compute features of the image patch of each spot with a frozen network.

    Patches are read in windows and encoded in batches. Finished batches are kept in ``scllm.settings.cache_dir``, so
    that an interrupted call goes on where it stopped, and a repeated one only reads the result.

    Parameters
    ----------
    adata
        Spots after :func:`scllm.pp.image_patches`.
    encoder
        - ``"resnet18"``, ``"vit_tiny"``, ``"dinov2"`` (small): networks of transformers, with 512, 192 and 384
          features;
        - ``"cnn_small"``: a convolutional network of 0.8 million weights with 256 features, for which no weights are
          published;
        - a folder with an image model of transformers (safetensors);
        - a function or module that takes patches ``(b, p, p, 3)``, bytes in a torch tensor, and returns features
          ``(b, d)``. Its results are not kept.

        Store features of encoders that are not distributed freely in ``obsm`` yourself, and pass their key as
        ``use_rep`` to :func:`fit_spatial`.
    pretrained
        Whether to use published weights, which are fetched once. ``False``: random weights.
    key_added
        Key of ``obsm`` to write.
    batch_size
        Number of patches per batch.
    device
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
    random_state
        Seed of random weights.
    copy
        Return a changed copy instead of changing ``adata``.

    Writes
    ------
    ``adata.obsm[key_added]``
        Features, ``(n_spots, d)`` float32.
    ``adata.uns["scllm"]["embed_patches"]``
        ``params``.

    Examples
    --------
    >>> adata = scllm.datasets.toy_spatial(n_sections=1, side=6)
    >>> scllm.pp.image_patches(adata, pixels=16)
    >>> scllm.tl.embed_patches(adata, encoder=lambda patches: patches.float().mean((1, 2)))
    >>> adata.obsm["X_patch"].shape
    (36, 3)
    """
    check_adata(adata, copy, key_added)
    key = free_key(adata, "obsm", key_added)
    if batch_size < 1:
        raise ValueError(f"Expected batch_size of at least 1, got {batch_size}. Pass a larger number.")
    reader = patch_reader(adata)
    chosen = resolve_device(device)
    own = not isinstance(encoder, (str, PathLike))
    network = encoder if own else image_encoder(encoder, pretrained=pretrained, random_state=random_state)
    if isinstance(network, nn.Module) and not own:
        network.to(chosen)
    file = None if own else _cache_file(adata, reader, network)
    log.info("encoding %d patches of %d px on %s", len(reader), reader.pixels, chosen)
    features = _features(reader, network, chosen, batch_size, file)

    adata = adata.copy() if copy else adata
    adata.obsm[key] = features
    name = getattr(encoder, "__name__", type(encoder).__name__) if own else str(encoder)
    params = {"encoder": name, "key_added": key, "random_state": random_state}
    record_name(adata, "obsm", key_added)
    record(adata, "embed_patches", params if own else {**params, "pretrained": pretrained})
    return adata if copy else None


def patch_reader(adata: AnnData) -> PatchReader:
    """Return what reads the pixels of the patches that ``pp.image_patches`` found."""
    written = recorded(adata, "image_patches", made_by="scllm.pp.image_patches(adata)")
    params = written["params"]
    key = str(params["key_added"])
    if key not in adata.obsm:
        raise missing_key(key, adata.obsm, "in adata.obsm", "Call scllm.pp.image_patches(adata) again.")
    libraries = adata.uns.get(_keys.SPATIAL, {})
    library_key = params.get("library_key")
    section = sections_of(adata.obs, libraries, None if library_key is None else str(library_key))
    return PatchReader(np.asarray(adata.obsm[key]), section, written["table"], libraries, int(params["pixels"]))


@torch.no_grad()
def _features(
    reader: PatchReader, network: Any, device: torch.device, batch_size: int, file: Path | None
) -> FloatArray:
    """Encode all patches, section by section; finished batches are appended to the file."""
    # stable, so that the patches of a section are read together, because only one decoded image is held
    order = np.argsort(reader.section.to_numpy().astype(str), kind="stable")
    done = _finished(file, len(order))
    found = [done] if len(done) else []
    starts = range(len(done), len(order), batch_size)
    for start in progress(starts, desc="encoding patches", total=len(starts), unit="batch"):
        patches = torch.from_numpy(reader.read(order[start : start + batch_size])).to(device)
        batch = _checked(network(patches), len(patches))
        if file is not None:
            _append(file, batch)
        found.append(batch)
    features = np.concatenate(found)
    by_spot = np.empty_like(features)
    by_spot[order] = features
    return by_spot


def _checked(batch: Any, n: int) -> FloatArray:
    batch = np.asarray(batch.detach().cpu() if isinstance(batch, Tensor) else batch, dtype=np.float32)
    if batch.ndim != 2 or len(batch) != n:
        raise ValueError(
            f"Expected the encoder to return features of shape ({n}, d) for {n} patches, got {batch.shape}. Return one "
            "row per patch."
        )
    if not np.isfinite(batch).all():
        raise ValueError("Expected finite features, but the encoder returned others. Check its weights and its input.")
    return batch


def _cache_file(adata: AnnData, reader: PatchReader, network: Any) -> Path:
    """Return the file of features that depend on these patches, images and weights."""
    digest = hashlib.blake2b(digest_size=12)
    digest.update(f"{reader.pixels} {reader.section.to_list()}".encode())
    digest.update(np.ascontiguousarray(reader.boxes).tobytes())
    for row in reader.table.itertuples():
        path = Path(str(row.image))
        stamp = (path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else ()
        digest.update(f"{row.section} {row.image} {row.scale} {stamp}".encode())
        library = adata.uns.get(_keys.SPATIAL, {}).get(str(row.section), {})
        if str(row.image) in library.get("images", {}):
            digest.update(np.ascontiguousarray(library["images"][str(row.image)]).tobytes())
    for name, weight in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return Path(settings.cache_dir) / "patches" / f"{digest.hexdigest()}.f32"


def _finished(file: Path | None, n: int) -> FloatArray:
    """Read the rows that an earlier call has finished; the name of the companion file holds their width."""
    if file is None or not file.is_file():
        return np.empty((0, 0), np.float32)
    width = int(file.with_suffix(".width").read_text())
    values = np.fromfile(file, np.float32)
    done = values[: len(values) // width * width].reshape(-1, width)[:n]
    if values.size != done.size:
        done.tofile(file)  # the end of a row that was being written when the process ended
    log.info("reading the features of %d of %d patches from %s", len(done), n, file)
    return done


def _append(file: Path, batch: FloatArray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        file.with_suffix(".width").write_text(str(batch.shape[1]))
    with file.open("ab") as handle:
        handle.write(np.ascontiguousarray(batch).tobytes())
