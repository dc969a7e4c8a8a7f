"""JSON and history lines that survive a killed process."""

from __future__ import annotations

import json

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
