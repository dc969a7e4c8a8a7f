"""Row 9: tl.embed, compared with the same weights in nn.TransformerEncoder on padded cells."""

from __future__ import annotations

from functools import partial

import numpy as np
from anndata import AnnData

from benchmarks._cells import blood_1200
from benchmarks._padded import PaddedModel
from benchmarks._timing import Ratio, Row, gemm_rate, in_turns, one_torch_thread
from benchmarks.row06_pretraining import base_model, training_flop
from scllm import models, tl
from scllm.data.vocab import Vocab
from scllm.models.base import CellModel

N_CELLS, ROUNDS = 64, 5
TARGET_BF16, COSINE_FP32, COSINE_BF16 = 2.5, 0.9999, 0.999


@one_torch_thread
def run() -> Row:
    adata = blood_1200()[:: blood_1200().n_obs // N_CELLS][:N_CELLS].copy()
    model = models.build("scgpt", vocab=Vocab.from_genes(adata.var_names)).eval()
    padded = PaddedModel(model).eval()
    ours = partial(embedded, adata, model)
    theirs = partial(embedded, adata, padded)
    expected = theirs()
    cosine_fp32, cosine_bf16 = (
        (ours(precision).astype(float) * expected).sum(1).min() for precision in ("fp32", "bf16")
    )

    *of_ours, of_theirs = in_turns((ours, partial(ours, "bf16"), theirs), rounds=ROUNDS)
    fp32, bf16 = (Ratio(found, of_theirs) for found in of_ours)
    lengths = tuple(int(n) + 1 for n in np.diff(adata.X.indptr))
    seconds = sorted(fp32.ours)[ROUNDS // 2]
    share = training_flop(base_model(n_tokens=10), lengths) / 3 / seconds / gemm_rate()
    return Row(
        number=9,
        what=f"tl.embed, scGPT base, {N_CELLS} blood cells of {np.mean(lengths):.0f} tokens on average",
        beside="the same weights and loader, padded in nn.TransformerEncoder with its fast path, fp32",
        ratio=f"bf16 {bf16}; fp32 {fp32}",
        absolute=f"{N_CELLS / seconds:.1f} cells per CPU-second in fp32; lowest cosine {cosine_fp32:.6f} in fp32, "
        f"{cosine_bf16:.5f} in bf16",
        share_of_roof=f"{share:.0%} of GEMM in fp32, counting all tokens in all blocks",
        target=f"bf16 >= {TARGET_BF16}x, cosine >= {COSINE_FP32} fp32, >= {COSINE_BF16} bf16",
        is_met=bf16.median >= TARGET_BF16 and cosine_fp32 >= COSINE_FP32 and cosine_bf16 >= COSINE_BF16,
    )


def embedded(adata: AnnData, model: CellModel, precision: str = "fp32") -> np.ndarray:
    """Compute embeddings, which have unit length."""
    tl.embed(adata, model, device="cpu", precision=precision)
    return adata.obsm["X_scllm"]
