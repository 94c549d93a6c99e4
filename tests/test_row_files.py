"""Files of results, in which a benchmark replaces what it measured again."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import versus_torchvision
from benchmarks.row_files import in_place_of, read_csv, write_csv, write_json

COLUMNS = ("arch", "batch", "ms")


def row(arch: str, batch: int, ms: float) -> dict[str, Any]:
    return dict(zip(COLUMNS, (arch, batch, ms), strict=True))


def test_what_is_measured_again_is_replaced_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    write_csv(path, [row("a", 8, 1), row("a", 8, 2), row("b", 8, 3), row("a", 1, 4)])
    earlier = read_csv(path, COLUMNS)
    write_csv(path, in_place_of(earlier, [row("c", 8, 5), row("a", 8, 6)], COLUMNS[:2]))
    wanted = [("a", "8", "6"), ("b", "8", "3"), ("a", "1", "4"), ("c", "8", "5")]
    assert [tuple(found.values()) for found in read_csv(path, COLUMNS)] == wanted
    assert [file.name for file in tmp_path.iterdir()] == ["rows.csv"]


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, objects = tmp_path / "rows.csv", tmp_path / "rows.json"
    write_csv(table, [row("a", 8, 1)])
    write_json(objects, [row("a", 8, 1)])
    with pytest.raises(ValueError, match="more"):
        write_csv(table, [row("a", 8, 2), row("b", 8, 3) | {"more": 1}])

    def full(file: Path, text: str, **_: Any) -> None:
        file.write_bytes(text.encode()[:5])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    for write, path in ((write_csv, table), (write_json, objects)):
        with pytest.raises(OSError, match="No space left"):
            write(path, [row("a", 8, 2)])
    assert [found["ms"] for found in read_csv(table, COLUMNS)] == ["1"]
    assert json.loads(objects.read_text()) == [row("a", 8, 1)]


def test_without_a_file_there_are_no_rows(tmp_path: Path) -> None:
    assert read_csv(None, COLUMNS) == read_csv(tmp_path / "none.csv", COLUMNS) == []


def test_a_file_with_other_columns_is_refused_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.csv"
    write_csv(path, [row("a", 8, 1)])
    monkeypatch.delattr(versus_torchvision, "compare")
    with pytest.raises(SystemExit, match="other columns than arch, mode"):
        versus_torchvision.main(["--csv", str(path)])
    assert [found["ms"] for found in read_csv(path, COLUMNS)] == ["1"]
