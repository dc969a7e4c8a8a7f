from __future__ import annotations

import numba
import numpy as np
import pytest
from anndata import read_h5ad
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.strategies import KINDS, ragged, rows_of
from messages import naming

from scllm.kernels.binning import _bin_rows, bin_edges, bin_rows

TIES = ("middle", "left", "right", "random")


def bin_row_slowly(x, n_bins, ties, u):
    edges = np.quantile(x[x != 0], np.linspace(0, 1, n_bins - 1)) if np.any(x) else np.zeros(n_bins - 1)
    upto, below = np.digitize(x, edges), np.digitize(x, edges, right=True)
    choices = {"middle": (upto + below + 1) // 2, "left": np.minimum(below + 1, upto), "right": upto}
    return np.where(x == 0, 0, choices[ties] if ties != "random" else np.ceil(u * (below - upto) + upto)).astype(int)


def bin_slowly(indptr, data, n_bins, ties, draws):
    rows = zip(rows_of(indptr, data), rows_of(indptr, draws), strict=True)
    return np.concatenate([np.empty(0, int), *(bin_row_slowly(x, n_bins, ties, u) for x, u in rows)])


@settings(deadline=None, max_examples=150)
@given(ragged(), st.sampled_from([2, 3, 7, 51, 256]), st.sampled_from(TIES))
def test_bins_are_those_of_numpy_quantile_and_digitize(rows, n_bins, ties):
    indptr, data = rows
    draws = np.random.default_rng(0).random(data.size)
    bins = bin_rows(indptr, data, n_bins=n_bins, ties=ties, draws=draws)
    np.testing.assert_array_equal(bins, bin_slowly(indptr, data, n_bins, ties, draws))


@settings(deadline=None, max_examples=50)
@given(ragged(), st.sampled_from([2, 7, 51]))
def test_edges_are_those_of_numpy_quantile_to_the_bit(rows, n_bins):
    indptr, data = rows
    expected = np.zeros((indptr.size - 1, n_bins))
    for i, x in enumerate(rows_of(indptr, data)):
        if np.any(x):
            expected[i, 1:] = np.quantile(x[x != 0], np.linspace(0, 1, n_bins - 1))
    np.testing.assert_array_equal(bin_edges(indptr, data, n_bins=n_bins), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ties", TIES)
def test_long_rows_agree_with_numpy_whichever_way_they_are_binned(kind, ties):
    rng = np.random.default_rng(0)
    data, indptr = KINDS[kind](rng, 6000).astype(np.float32), np.array([0, 2000, 2001, 6000])
    draws = rng.random(data.size)
    bins = bin_rows(indptr, data, n_bins=51, ties=ties, draws=draws)
    np.testing.assert_array_equal(bins, bin_slowly(indptr, data, 51, ties, draws))


def test_rows_of_all_kinds_can_share_a_block():
    rng = np.random.default_rng(1)
    rows = [make(rng, n) for n in (0, 1, 40, 700) for make in KINDS.values()] * 20
    indptr, data = np.concatenate([[0], np.cumsum([row.size for row in rows])]), np.concatenate(rows)
    draws = np.zeros(data.size)
    bins = bin_rows(indptr, data, n_bins=20)
    np.testing.assert_array_equal(bins, bin_slowly(indptr, data, 20, "middle", draws))


def test_the_largest_counts_are_counted_right():
    data = np.repeat(np.array([1, 2, 255, 256, 1024, 65_535, 65_536], np.float32), 5000)
    indptr = np.array([0, 30_000, data.size])
    bins = bin_rows(indptr, data, n_bins=51)
    np.testing.assert_array_equal(bins, bin_slowly(indptr, data, 51, "middle", np.zeros(data.size)))


def test_more_bins_than_a_byte_holds_need_a_wider_type():
    data, indptr = np.random.default_rng(0).random(3000), np.array([0, 3000])
    bins = bin_rows(indptr, data, n_bins=65_536, dtype=np.uint16)
    np.testing.assert_array_equal(bins, bin_slowly(indptr, data, 65_536, "middle", np.zeros(data.size)))
    with pytest.raises(ValueError, match=naming("dtype", "uint8", 256)):
        bin_rows(indptr, data, n_bins=257)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32, np.float16, bool])
def test_other_types_give_the_same_bins(dtype):
    data, indptr = np.random.default_rng(0).geometric(0.5, 100).astype(dtype), np.array([0, 60, 100])
    np.testing.assert_array_equal(
        bin_rows(indptr, data, n_bins=11), bin_rows(indptr, data.astype(np.float64), n_bins=11)
    )


@pytest.mark.parametrize("ties", TIES)
def test_a_monotone_scaling_of_the_row_keeps_the_bins(ties):
    rng = np.random.default_rng(0)
    counts, draws, indptr = rng.geometric(0.6, 900).astype(np.float32), rng.random(900), np.array([0, 400, 900])
    scaled = np.log1p(counts * np.repeat([1.7, 0.2], [400, 500]))
    options = {"n_bins": 51, "ties": ties, "draws": draws}
    np.testing.assert_array_equal(bin_rows(indptr, counts, **options), bin_rows(indptr, scaled, **options))


@pytest.mark.parametrize("kind", ["counts", "continuous"])
def test_bins_do_not_depend_on_the_number_of_threads(kind):
    rng = np.random.default_rng(0)
    indptr = np.concatenate([[0], np.cumsum(rng.integers(0, 700, 700))])
    data, draws = KINDS[kind](rng, indptr[-1]).astype(np.float32), rng.random(indptr[-1])
    one, *more = (with_threads(n, indptr, data, draws) for n in range(1, min(2, numba.config.NUMBA_NUM_THREADS) + 1))
    for other in [*more, bins_of_the_serial_kernel(indptr, data, draws)]:
        np.testing.assert_array_equal(one, other)


def with_threads(n_threads, indptr, data, draws):
    before = numba.get_num_threads()
    numba.set_num_threads(n_threads)
    try:
        return bin_rows(indptr, data, n_bins=51, ties="random", draws=draws)
    finally:
        numba.set_num_threads(before)


def bins_of_the_serial_kernel(indptr, data, draws):
    out = np.empty(data.size, np.uint8)
    _bin_rows.serial(indptr, data, data.view(np.uint32), True, np.linspace(0, 1, 50), 3, draws, out)
    return out


def test_what_cannot_be_binned_is_said():
    indptr, data = np.array([0, 2]), np.ones(2)
    with pytest.raises(ValueError, match=naming("ties", "'centre'", "'middle'", "'random'")):
        bin_rows(indptr, data, n_bins=5, ties="centre")
    with pytest.raises(ValueError, match=naming("n_bins", 1, 2, "65,536")):
        bin_rows(indptr, data, n_bins=1)
    with pytest.raises(ValueError, match=naming("draws", "None", "ties='random'")):
        bin_rows(indptr, data, n_bins=5, ties="random")


@pytest.fixture(scope="module")
def scgpt(shared):
    with np.load(shared / "parity" / "scgpt" / "preprocess.npz") as arrays:
        return dict(arrays)


def as_rows(dense):
    """CSR pieces of the non-zero entries, and where they stand."""
    is_stored = dense != 0
    return np.concatenate([[0], np.cumsum(is_stored.sum(axis=1))]), dense[is_stored], is_stored


def replayed(seed, indptr):
    stream = np.random.RandomState(int(seed))
    return np.concatenate([np.empty(0), *(stream.rand(n) for n in np.diff(indptr))])


def binned_with_replayed_draws(dense, seed, n_bins):
    indptr, data, is_stored = as_rows(dense)
    bins = np.zeros(dense.shape, np.int64)
    bins[is_stored] = bin_rows(indptr, data, n_bins=int(n_bins), ties="random", draws=replayed(seed, indptr))
    return bins


def test_parity_scgpt_binning_replays_the_original_draws(scgpt):
    bins = binned_with_replayed_draws(scgpt["pre_log1p"], scgpt["pre_seed"], scgpt["pre_n_bins"])
    np.testing.assert_array_equal(bins, scgpt["pre_binned"])


def test_parity_scgpt_binning_of_raw_counts_replays_the_original_draws(scgpt, shared):
    # the counts of the file beside: in `pre_counts` one row was emptied, here it was binned and took its draws
    counts = read_h5ad(shared / "parity" / "scgpt" / "adata.h5ad").X.toarray()
    bins = binned_with_replayed_draws(counts, scgpt["pre_binned_counts_seed"], scgpt["pre_n_bins"])
    np.testing.assert_array_equal(bins, scgpt["pre_binned_counts"])


@pytest.mark.parametrize("source", ["pre_counts", "pre_normed", "pre_log1p"])
@pytest.mark.parametrize("ties", ["middle", "left", "right"])
def test_parity_scgpt_binning_without_draws_stays_in_the_range_of_the_draws(scgpt, source, ties):
    indptr, data, is_stored = as_rows(scgpt[source])
    bins = bin_rows(indptr, data, n_bins=int(scgpt["pre_n_bins"]), ties=ties)
    low, high = scgpt["pre_digit_lo"][is_stored], scgpt["pre_digit_hi"][is_stored]
    assert np.all((low <= bins) & (bins <= high))
    if ties != "middle":
        np.testing.assert_array_equal(bins, {"left": low, "right": high}[ties])


def test_parity_scgpt_binning_has_the_original_edges(scgpt):
    indptr, data, _ = as_rows(scgpt["pre_log1p"])
    edges = bin_edges(indptr, data, n_bins=int(scgpt["pre_n_bins"]))
    np.testing.assert_allclose(edges, scgpt["pre_bin_edges"], rtol=1e-6)
