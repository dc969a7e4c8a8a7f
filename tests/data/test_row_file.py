"""Processes that share the rows of one file."""

from __future__ import annotations

import numpy as np
import pytest
import zarr
from messages import naming

from scllm.data import row_file
from scllm.data.row_file import Share, own_share, rows_when_whole


def read(path) -> np.ndarray:
    return np.load(path) if path.suffix == ".npy" else zarr.open_array(path)[:]


def write(path, share: Share, values: np.ndarray, key: str = "model") -> None:
    rows = share.rows(len(values))
    with rows_when_whole(path, len(values), share, key) as file:
        for start in range(rows.start, rows.stop, 7) if file is not None else ():
            file.write(start, values[start : min(start + 7, rows.stop)])


@pytest.mark.parametrize("n_rows", [1, 10, 63, 64, 65, 1000])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_row_is_in_one_share_and_every_chunk_too(n_rows, world, monkeypatch):
    monkeypatch.setattr(row_file, "BLOCK", 32)
    shares = [Share(rank, world) for rank in range(world)]
    rows = [np.arange(n_rows)[share.rows(n_rows)] for share in shares]
    np.testing.assert_array_equal(np.concatenate(rows), np.arange(n_rows))
    blocks = [set(part // shares[0].block(n_rows)) for part in rows]
    assert sum(map(len, blocks)) == len(set.union(*blocks))
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_the_file_appears_with_the_last_share(tmp_path, suffix, order):
    values = np.random.default_rng(0).normal(size=(100, 5)).astype(np.float32)
    out = tmp_path / f"embedding{suffix}"
    for rank in order:
        assert not out.exists()
        write(out, Share(rank, 3), values)
    np.testing.assert_array_equal(read(out), values)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_only_failed_processes_have_to_be_started_again(tmp_path):
    values, out = np.arange(60, dtype=np.float32).reshape(20, 3), tmp_path / "x.npy"
    np.save(out, values[:2])
    write(out, Share(0, 2), values)

    def fail() -> None:
        with rows_when_whole(out, 20, Share(1, 2), "model") as file:
            file.write(10, values[10:12])
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        fail()
    np.testing.assert_array_equal(np.load(out), values[:2])
    with rows_when_whole(out, 20, Share(0, 2), "model") as file:
        assert file is None
    write(out, Share(1, 2), values)
    np.testing.assert_array_equal(np.load(out), values)


def test_rows_of_another_model_are_not_mixed_in(tmp_path):
    values, out = np.ones((20, 3), np.float32), tmp_path / "x.zarr"
    write(out, Share(0, 2), values)
    write(out, Share(1, 2), 2 * values, key="other model")
    assert not out.exists()
    write(out, Share(0, 2), 2 * values, key="other model")
    np.testing.assert_array_equal(read(out), 2 * values)


def test_an_older_start_notices_that_it_was_overtaken(tmp_path):
    values, out = np.ones((20, 3), np.float32), tmp_path / "x.npy"

    def overtaken() -> None:
        with rows_when_whole(out, 20, Share(0, 2), "old"):
            write(out, Share(1, 2), values, key="new")

    with pytest.raises(RuntimeError, match=naming(out)):
        overtaken()


def test_the_share_is_that_of_the_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert own_share() == Share(0, 1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert own_share() == Share(3, 4)
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(ValueError, match=naming("RANK", 4)):
        own_share()
