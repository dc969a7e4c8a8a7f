"""Small simulated tissue sections with known structure."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import sparse
from scipy.ndimage import gaussian_filter

from scllm import _keys
from scllm._typing import FloatArray

__all__ = ["toy_spatial"]

_N_PROGRAMMES = 8
_N_VISIBLE = 4
_TILE = 16  # pixels per spot in the image
_SMOOTH = 2.0  # width of a programme's pattern, in spots
_EFFECT = 0.7  # log fold change of a gene per unit of its programme
_DEPTH = 30.0  # mean counts per gene at depth 1
_BACKGROUND = np.array([205.0, 150.0, 190.0])  # eosin pink
_TONES = np.array([[-35.0, 0.0, 0.0], [0.0, -35.0, 0.0], [0.0, 0.0, -35.0]])
_NUCLEUS = np.array([90.0, 60.0, 140.0])


def toy_spatial(*, n_sections: int = 3, side: int = 16, n_genes: int = 80, random_state: int = 0) -> AnnData:
    """Simulate tissue sections whose image shows half of what drives expression.

    Eight programmes vary smoothly over each section. Each gene belongs to one of them, and the logarithm of its rate
    is linear in the programme; counts are Poisson. Four programmes are visible in the image: three change the tone of
    the tissue, the fourth the number of nuclei. The other four cannot be seen, so that no model can predict them.

    Parameters
    ----------
    n_sections
        Number of sections.
    side
        Number of spots along each edge of a section.
    n_genes
        Number of genes, at least 16, divided evenly between the programmes.
    random_state
        Random seed.

    Returns
    -------
    Counts in ``X`` (CSR float32), ``obs["section"]``, positions in ``obsm["spatial"]``, the programmes in
    ``obsm["programmes"]`` (the visible ones first), images in ``uns["spatial"]`` in the Visium layout, and in
    ``uns["toy_spatial"]`` the ``programme`` of each gene and the number of visible programmes, ``n_visible``.

    Examples
    --------
    >>> adata = scllm.datasets.toy_spatial(n_sections=2, side=10)
    >>> adata.shape, sorted(adata.uns["spatial"])
    ((200, 80), ['section1', 'section2'])
    """
    if n_sections < 1 or side < 4 or n_genes < 2 * _N_PROGRAMMES:
        raise ValueError(
            f"Expected at least 1 section, a side of 4 spots and {2 * _N_PROGRAMMES} genes, got "
            f"n_sections={n_sections}, side={side} and n_genes={n_genes}. Pass larger numbers."
        )
    rng = np.random.default_rng(random_state)
    programme = np.arange(n_genes) % _N_PROGRAMMES
    level = rng.lognormal(0, 0.7, n_genes)
    effect = _EFFECT * rng.uniform(0.6, 1.4, n_genes)
    names = [f"section{number + 1}" for number in range(n_sections)]
    counts, levels, libraries = [], [], {}
    for name in names:
        fields = _fields(side, rng)
        rate = _DEPTH * level * np.exp(fields[:, programme] * effect - effect**2 / 2)
        depth = rng.lognormal(0, 0.2, (side**2, 1))
        counts.append(sparse.csr_matrix(rng.poisson(rate * depth), dtype=np.float32))
        levels.append(fields)
        libraries[name] = _library(_image(fields, side, rng))
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2)
    obs = pd.DataFrame(
        {_keys.SECTION: pd.Categorical(np.repeat(names, side**2), categories=names)},
        index=[f"{name}_{x}x{y}" for name in names for x, y in grid],
    )
    adata = AnnData(
        sparse.vstack(counts, format="csr"), obs=obs, var=pd.DataFrame(index=[f"gene{g}" for g in range(n_genes)])
    )
    adata.obsm[_keys.SPATIAL] = np.tile((grid + 0.5) * _TILE, (n_sections, 1))
    adata.obsm[_keys.PROGRAMMES] = np.vstack(levels).astype(np.float32)
    adata.uns[_keys.SPATIAL] = libraries
    adata.uns[_keys.TOY_SPATIAL] = {"programme": programme, "n_visible": _N_VISIBLE}
    return adata


def _fields(side: int, rng: Generator) -> FloatArray:
    """Draw smooth programmes of mean 0 and standard deviation 1, ``(side², 8)``."""
    noise = rng.normal(size=(_N_PROGRAMMES, side, side))
    smooth = np.stack([gaussian_filter(one, _SMOOTH, mode="wrap") for one in noise]).reshape(_N_PROGRAMMES, -1).T
    return (smooth - smooth.mean(axis=0)) / smooth.std(axis=0)


def _image(fields: FloatArray, side: int, rng: Generator) -> NDArray[np.uint8]:
    """Draw the tissue: each spot's tile has a tone and a number of nuclei that follow the visible programmes."""
    squashed = np.tanh(fields[:, :_N_VISIBLE] / 1.5)
    tone = _BACKGROUND + squashed[:, :3] @ _TONES
    share = 0.3 + 0.25 * squashed[:, 3]  # of pixels that are nuclei
    tiles = np.kron(tone.reshape(side, side, 3), np.ones((_TILE, _TILE, 1)))
    is_nucleus = rng.random(tiles.shape[:2]) < np.kron(share.reshape(side, side), np.ones((_TILE, _TILE)))
    tiles[is_nucleus] = _NUCLEUS
    return np.clip(tiles + rng.normal(0, 4, tiles.shape), 0, 255).astype(np.uint8)


def _library(image: NDArray[np.uint8]) -> dict[str, object]:
    factors = {"tissue_hires_scalef": 1.0, "spot_diameter_fullres": 0.6 * _TILE}
    return {"images": {"hires": image}, "scalefactors": factors, "metadata": {}}
