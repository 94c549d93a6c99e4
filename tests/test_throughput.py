"""The benchmarks say what they timed, and refuse what they cannot time."""

import csv
import json
import pathlib

import pytest

from benchmarks import largest_batch, throughput, versus_torchvision, workloads
from benchmarks.paired import Timing

LENET = {"arch": "lenet5", "image_size": 32, "num_classes": 10, "precision": "float32"}


@pytest.mark.slow
def test_a_row_for_each_case(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = tmp_path / "rows.csv", tmp_path / "rows.json"
    throughput.main(
        [
            *("--arch", "lenet5", "--batch_size", "4", "--devices", "2", "--num_classes", "10"),
            *("--precision", "float32", "bfloat16", "--mode", "train"),
            *("--rounds", "2", "--round_seconds", "0.01", "--image_size", "32"),
            *("--csv", str(files[0]), "--json", str(files[1])),
        ]
    )
    rows = json.loads(files[1].read_text())
    assert [row["precision"] for row in rows] == ["float32", "bfloat16"]
    for row in rows:
        assert (row["devices"], row["batch_size"], row["rounds"]) == (2, 4, 2)
        assert row["images_per_second"] == pytest.approx(8e3 / row["step_ms"], rel=1e-2)
        assert row["fastest_ms"] <= row["step_ms"] <= row["slowest_ms"]
        assert row["compile_seconds"] > 0
        assert row["peak_mb"] > 0
        assert 0 < row["utilisation"] < 1
        # Three times two operations for each of LeNet-5's multiply-adds.
        rate = 6 * 8 * macs_of_lenet() / (row["step_ms"] / 1e3) / 1e9
        assert row["gflops_per_second"] == pytest.approx(rate, rel=0.2, abs=0.1)
    with files[0].open() as file:
        assert len(list(csv.DictReader(file))) == 2
    assert capsys.readouterr().out.count("\n") == 4


def macs_of_lenet() -> int:
    import flaxcnn

    return flaxcnn.summarize("lenet5", image_size=32).macs


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--arch", "resnet5"), "--arch: no network resnet5"),
        (("--arch", "vgg16", "--image_size", "16"), "vgg16 needs images of at least 32 pixels"),
        (("--batch_size", "0"), "neither a number of images nor max"),
        (("--devices", "none"), "neither a number nor all"),
        (("--rounds", "0"), "--rounds must be at least 1"),
    ],
)
def test_wrong_requests(
    flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        throughput.main(flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("workload", ["training", "prediction"])
def test_the_largest_batch_fits_and_a_larger_one_does_not(
    workload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = 40_000_000
    monkeypatch.setattr(largest_batch, "device_bytes", lambda: memory)
    batch_size = largest_batch.search(workload, **LENET)

    def planned(images: int) -> int:
        program = getattr(workloads, f"{workload}_program")(batch_size=images, **LENET)
        return workloads.planned_bytes(program)

    assert planned(batch_size) <= 0.9 * memory < planned(round(1.1 * batch_size))


def test_where_not_one_image_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(largest_batch, "device_bytes", lambda: 1000)
    with pytest.raises(RuntimeError, match="one image takes more"):
        largest_batch.search("prediction", **LENET)


def test_device_counts() -> None:
    assert throughput.device_counts("3") == [3]
    assert throughput.device_counts("all") == [1, 2, 4, 8]  # as the tests' settings have it


def test_the_ratio_is_to_the_fastest_torch_round_by_round() -> None:
    def timing(name: str, seconds: tuple[float, ...], logits: str) -> Timing:
        facts = {"logits": logits, "compile_seconds": "1", "versions": "v", "device": "cpu"}
        return Timing(name, seconds, facts)

    timings = [
        timing("flaxcnn", (1.0, 2.0, 8.0), "1 -4"),
        timing("torch, NCHW", (4.0, 4.0, 4.0), "1 -4"),
        timing("torch, channels_last", (2.0, 2.0, 2.0), "1.5 -4"),
    ]
    base = versus_torchvision.fastest_torch(timings)
    assert base.name == "torch, channels_last"
    assert timings[0].ratio_to(base) == (1.0, 0.5, 4.0)
    assert versus_torchvision.logits_apart(timings[0], base) == pytest.approx(0.5 / 4)
    shown = versus_torchvision.table(timings)
    assert "ratio to torch, channels_last" in shown
    assert "1.2e-01 of the largest apart" in shown
    case = versus_torchvision.Case("resnet18", "train", 32, 128, "float32")
    rows = versus_torchvision.rows_of(case, timings)
    assert len(rows) == 9
    assert rows[0]["logits_apart"] == "1.25e-01"
