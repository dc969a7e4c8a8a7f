"""Type aliases shared by all floors."""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

__all__ = ["CSR", "FloatArray", "HeadReads", "HeadSetting", "IntArray", "Rows"]

CSR: TypeAlias = sparse.csr_matrix
IntArray: TypeAlias = NDArray[np.integer]
FloatArray: TypeAlias = NDArray[np.floating]
Rows: TypeAlias = NDArray[np.integer] | slice
HeadReads: TypeAlias = Literal["inputs", "last", "both"]
HeadSetting: TypeAlias = Literal["inputs", "last", "both", "published"]
