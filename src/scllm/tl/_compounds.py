"""Vectors of compounds: passed by the caller, or Morgan fingerprints of their structures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from scllm._checks import missing_key
from scllm._typing import FloatArray

__all__ = ["Compounds", "Covariate", "read_compounds"]

Covariate = Mapping[str, str] | Mapping[str, Sequence[float]] | pd.DataFrame | pd.Series

_RADIUS, _N_BITS = 2, 1024


@dataclass(frozen=True)
class Compounds:
    """Vectors of compounds.

    Parameters
    ----------
    vectors
        One row for each compound, ``(n, f)``.
    scaffolds
        Murcko scaffold of each compound; ``None`` if structures are not known.
    """

    vectors: FloatArray
    scaffolds: list[str] | None = None

    @property
    def are_bits(self) -> bool:
        """Whether the vectors are fingerprints, of zeros and ones."""
        return bool(np.isin(self.vectors, (0, 1)).all())


def read_compounds(covariate: Covariate, names: Sequence[str]) -> Compounds:
    """Return the vectors of compounds; texts are SMILES, of which fingerprints are computed.

    Raises ``KeyError`` for a compound without a vector, and ``ValueError`` for structures that cannot be read and
    vectors of different lengths.
    """
    table = dict(zip(covariate.index.astype(str), covariate.to_numpy(), strict=True)) if isinstance(
        covariate, pd.DataFrame | pd.Series
    ) else {str(name): value for name, value in covariate.items()}  # fmt: skip
    lacking = [name for name in names if name not in table]
    if lacking:
        raise missing_key(lacking[0], table, "in covariate, which needs one entry for each compound")
    values = [table[name] for name in names]
    if all(isinstance(value, str) for value in values):
        return _fingerprints(names, values)
    lengths = {np.size(value) for value in values}
    if len(lengths) > 1:
        raise ValueError(f"Expected covariate vectors of one length, got lengths {sorted(lengths)}. Pad them.")
    vectors = np.array([np.ravel(np.asarray(value, np.float32)) for value in values], np.float32)
    if not np.isfinite(vectors).all():
        bad = int(np.flatnonzero(~np.isfinite(vectors).all(1))[0])
        raise ValueError(f"Expected finite numbers in covariate, got others for {names[bad]!r}. Correct its vector.")
    return Compounds(vectors)


def _fingerprints(names: Sequence[str], smiles: Sequence[str]) -> Compounds:
    """Compute Morgan fingerprints and Murcko scaffolds."""
    try:
        from rdkit import Chem, RDLogger
        from rdkit.Chem.rdFingerprintGenerator import GetMorganGenerator
        from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmiles
    except ImportError as error:
        raise ImportError(
            "Expected rdkit to compute fingerprints of SMILES, but it is not installed. Run: pip install "
            '"scllm-tools[chem]", or pass vectors as covariate=.'
        ) from error
    generator, vectors, scaffolds = GetMorganGenerator(_RADIUS, fpSize=_N_BITS), [], []
    RDLogger.DisableLog("rdApp.error")
    try:
        for name, text in zip(names, smiles, strict=True):
            molecule = Chem.MolFromSmiles(text)
            if molecule is None:
                raise ValueError(
                    f"Expected a valid SMILES for the compound {name!r}, got {text!r}. Correct it, or pass vectors."
                )
            vectors.append(generator.GetFingerprintAsNumPy(molecule).astype(np.float32))
            scaffolds.append(MurckoScaffoldSmiles(mol=molecule))
    finally:
        RDLogger.EnableLog("rdApp.error")
    return Compounds(np.array(vectors), scaffolds)
