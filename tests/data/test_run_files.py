"""JSON and history lines that survive a killed process."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from scllm.data.run_files import append_history, cut_history, read_history, read_json, write_json, write_text

LINES = [{"step": i, "split": "train", "loss": 1 / i} for i in range(1, 5)]


def test_what_was_written_reads_back_and_nothing_is_left_beside(tmp_path):
    write_json(tmp_path / "spec.json", {"a": [1, None, "x"]})
    assert read_json(tmp_path / "spec.json") == {"a": [1, None, "x"]}
    assert [path.name for path in tmp_path.iterdir()] == ["spec.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "spec.json"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == "old"


def test_history_is_a_row_a_line(tmp_path):
    path = tmp_path / "history.jsonl"
    assert read_history(path) is None
    append_history(path, LINES[:2])
    append_history(path, LINES[2:])
    assert read_history(path).to_dict("records") == LINES


def test_half_a_line_at_the_end_is_left_out(tmp_path):
    path = tmp_path / "history.jsonl"
    append_history(path, LINES[:2])
    with path.open("a") as handle:
        handle.write(json.dumps(LINES[2])[:-4])
    assert read_history(path)["step"].tolist() == [1, 2]


def test_cutting_drops_later_steps_and_half_lines(tmp_path):
    path = tmp_path / "history.jsonl"
    append_history(path, LINES)
    with path.open("a") as handle:
        handle.write('{"step": 2')
    cut_history(path, 2)
    append_history(path, LINES[2:])
    assert [json.loads(line) for line in path.read_text().splitlines()] == LINES
    cut_history(tmp_path / "missing.jsonl", 2)  # nothing to cut
    assert not (tmp_path / "missing.jsonl").exists()


def test_cutting_at_any_step_keeps_the_same_lines_as_reading_all_of_them(tmp_path):
    rng = np.random.default_rng(0)
    lines = []
    for step in range(40):
        lines.append({"step": step, "split": "train", "note": "x" * int(rng.integers(0, 300))})
        if step % 7 == 0:
            lines.append({"step": step, "split": "validation"})
    path = tmp_path / "history.jsonl"
    for step in range(-1, 42):
        path.unlink(missing_ok=True)
        append_history(path, lines)
        with path.open("a") as handle:
            handle.write(json.dumps({"step": 0, "split": "train"}))  # a whole object, but not a whole line
        cut_history(path, step)
        found = [json.loads(line) for line in path.read_text().splitlines()]
        assert found == [line for line in lines if line["step"] <= step]


def test_cutting_reads_few_lines_of_a_long_history(tmp_path):
    path = tmp_path / "history.jsonl"
    append_history(path, [{"step": step, "loss": 1 / (1 + step)} for step in range(4096)])
    whole = path.read_bytes().splitlines(keepends=True)
    # any of these lines would be an error if it was read
    path.write_bytes(b"".join([b"not JSON\n" * 1024, *whole[1024:]]))
    cut_history(path, 4000)
    assert path.read_bytes().splitlines(keepends=True)[1024:] == whole[1024:4001]


def test_a_history_keeps_every_number_to_the_last_digit(tmp_path):
    rng = np.random.default_rng(0)
    lines = [{"step": step, "loss": float(rng.lognormal(0, 20))} for step in range(1000)]
    lines[500] |= {"mse": 0.1 + 0.2}
    path = tmp_path / "history.jsonl"
    append_history(path, lines)
    expected = pd.DataFrame([json.loads(line) for line in path.read_text().splitlines()])
    pd.testing.assert_frame_equal(read_history(path), expected, check_exact=True)
    assert read_history(path)["loss"].tolist() == [line["loss"] for line in lines]
