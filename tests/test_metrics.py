"""metrics.jsonl: whole lines only, and none twice; what is shown of a run."""

import dataclasses
import io
import json
import pathlib
import sys

import pytest
from plans import PLAN

from train import metrics


def record(step: int, split: str = "train") -> metrics.Record:
    return {"split": split, "step": step, "loss": step / 10}


def test_a_resumed_log_is_cut_back_to_its_step(tmp_path: pathlib.Path) -> None:
    with metrics.run_log(str(tmp_path), 0) as write:
        for step in (10, 20, 30):
            write(record(step))
            write(record(step, "test"))
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"split": "train", "step": 4')  # killed in mid-line
    with metrics.run_log(str(tmp_path), 20) as write:
        write(record(25))
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["split"], r["step"]) for r in found] == [
        ("train", 10), ("test", 10), ("train", 20), ("test", 20), ("train", 25),
    ]  # fmt: skip


def test_without_a_directory_nothing_is_written(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with metrics.run_log(None, 0) as write:
        write(record(1))
    assert not list(tmp_path.iterdir())


def test_the_clock_tells_waiting_from_working(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now)
    clock = metrics.Clock()
    for _ in range(4):
        with clock.waiting_for_data():
            now += 1
        now += 3
    with clock.paused(PLAN):  # anything that is there already
        now += 50
    assert clock.lap() == (4 / 16, 4 / 16)


@pytest.mark.parametrize(
    ("augmentation", "flip", "said"),
    [
        ("none", False, "no augmentation"),
        ("none", True, "flip"),
        ("pad_crop", False, "pad_crop"),
        ("pad_crop", True, "pad_crop and flip"),
    ],
)
def test_the_header_says_what_is_done_to_images(augmentation: str, flip: bool, said: str) -> None:
    plan = dataclasses.replace(PLAN, augmentation=augmentation, flip=flip)
    header = "\n".join(metrics.header(plan, 60_850, 60_850, 327_000, None))
    assert f", {said}; seed 0" in header


def test_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {"epoch": 1.5, "top1": 0.25, "images_per_second": 123.4, "data_wait": 0.02}
    with metrics.Progress(0, 100, shown=True) as progress:
        progress.advance()
        progress.train({**record(50), **shown})
        progress.test({**record(50, "test"), "top1": 0.5, "top5": 0.75, "n": 360})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 50/100  epoch 1.5  loss 5.0000  top-1 25.0%  123 images/s")
    assert "waiting for data 2%" in lines[0]
    assert "ETA" in lines[0]
    assert lines[1].endswith("top-1 50.00%  top-5 75.00%  (360 images)")
    with metrics.Progress(0, 100, shown=False) as progress:
        progress.train({**record(50), **shown})
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("step", "steps", "step_seconds", "record", "expected"),
    [
        (
            226,
            300,
            0.02,
            {"epoch": 4.5, "loss": 0.124, "top1": 0.966, "images_per_second": 2476.4},
            "226/300 ETA 00:01 epoch 4.5 loss 0.124 top-1 96.6% 2476 img/s wait 16% 75% ###",
        ),
        (  # 90 epochs of ImageNet leave nothing for the bar
            99_999,
            450_450,
            0.12,
            {"epoch": 19.9, "loss": 2.4567, "top1": 0.456, "images_per_second": 12_345.6},
            "99999/450450 ETA 11:40:54 epoch 19.9 loss 2.46 top-1 45.6% 12346 img/s wait 16%",
        ),
    ],
)
def test_the_bar_says_everything_in_80_columns(
    step: int,
    steps: int,
    step_seconds: float,
    record: metrics.Record,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda file: (80, 24))
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", terminal)
    with metrics.Progress(step - 1, steps, shown=True) as progress:
        now += step_seconds
        progress.advance()
        progress.train({**record, "data_wait": 0.16})
        shown = terminal.getvalue().split("\r")[-1]
    assert shown.startswith(expected)
    assert len(shown) <= 80
