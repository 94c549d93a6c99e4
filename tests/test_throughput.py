"""The benchmarks say what they timed, and refuse what they cannot time."""

import csv
import dataclasses
import json
import pathlib
import platform
import subprocess
import sys

import pytest

from benchmarks import largest_batch, throughput, versus_torchvision, workloads
from benchmarks.paired import Contestant, Timing, time_in_turns

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
    with files[0].open() as file:
        assert len(list(csv.DictReader(file))) == 2
    assert capsys.readouterr().out.count("\n") == 4


def test_multiply_adds_are_those_of_the_network_that_ran() -> None:
    """LeNet-5 with 1,000,000 classes is little but its last layer, of 84 inputs."""
    facts = {
        "device": "cpu",
        "versions": "v",
        "compile_seconds": "1",
        "peak_bytes": "1",
        "planned_bytes": "1",
    }
    case = throughput.Case("lenet5", "train", 32, 4, "float32", 2)
    product = Timing("product", (1.0, 2.0, 3.0), facts | {"flops": "4e12"})
    network = Timing("lenet5", (2.0, 2.0, 2.0), facts)
    numbers = throughput.numbers_of(case, 1_000_000, product, network)
    # Two operations for each, and a training step is three forward passes: 8 images in 2 seconds.
    rate = 2 * 3 * 84e6 * 8 / 2
    assert numbers["gflops_per_second"] == pytest.approx(rate / 1e9, rel=0.02)
    assert numbers["utilisation"] == pytest.approx(rate / 2e12, rel=0.3)
    assert numbers["images_per_second"] == 4


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


@pytest.mark.slow
@pytest.mark.parametrize("workload", ["training", "prediction"])
def test_the_largest_batch_fits_and_a_larger_one_does_not(
    workload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = 40_000_000
    monkeypatch.setattr(largest_batch, "device_bytes", lambda devices: memory // devices)
    batch_size = largest_batch.find_here(workload, devices=2, **LENET)

    def planned(images: int) -> int:
        program = getattr(workloads, f"{workload}_program")(batch_size=images, **LENET)
        return workloads.planned_bytes(program)

    assert planned(batch_size) <= 0.9 * memory / 2 < planned(round(1.03 * batch_size) + 1)


@pytest.mark.parametrize("limit", [0, 1, 7, 8, 9, 100, 1000])
def test_the_most_that_fits(limit: int) -> None:
    found = largest_batch.most(lambda number: number <= limit)
    assert 0.98 * limit - 1 <= found <= limit
    assert found or not limit


def test_where_not_one_image_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(largest_batch, "device_bytes", lambda devices: 1000)
    with pytest.raises(RuntimeError, match="one image takes more"):
        largest_batch.find_here("prediction", **LENET)


def test_more_devices_than_there_are() -> None:
    with pytest.raises(RuntimeError, match="9 devices are asked for, and there are 8"):
        workloads.prediction(**LENET, batch_size=9, devices=9)


def test_a_case_that_fails_is_told_and_the_others_go_on(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def row_of(case: throughput.Case, options: object) -> dict[str, object]:
        if case.batch_size == 1:
            raise RuntimeError("out of memory")
        facts = {"device": "cpu", "cpu": "c", "versions": "v"}
        return dict.fromkeys(throughput.COLUMNS, "x") | facts

    monkeypatch.setattr(throughput, "row_of", row_of)
    file = tmp_path / "new" / "rows.json"
    flags = ["--arch", "lenet5", "--mode", "train", "--batch_size", "1", "2"]
    assert throughput.main([*flags, "--json", str(file)]) == 1
    assert "lenet5 train: out of memory" in capsys.readouterr().err
    assert len(json.loads(file.read_text())) == 1


# What a machine with an accelerator may lack; torch is for worker processes alone.
THEIRS = ("__init__", "torch_workloads", "torch_cifar_resnet")
LACKING = ("grain", "tensorflow_datasets", "tyro", "zlib_ng", "torch", "torchvision")


def test_all_benchmarks_import_without_what_a_machine_may_lack() -> None:
    names = sorted(path.stem for path in pathlib.Path(throughput.__file__).parent.glob("*.py"))
    names = [f"benchmarks.{name}" for name in names if name not in THEIRS]
    assert len(names) > 10
    program = f"""
import importlib, sys
for name in {LACKING}:
    sys.modules[name] = None
for name in {names}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_device_counts() -> None:
    assert throughput.device_counts("3") == [3]
    assert throughput.device_counts("all") == [1, 2, 4, 8]  # as the tests' settings have it


def test_the_ratio_is_to_the_fastest_torch_round_by_round() -> None:
    def timing(name: str, seconds: tuple[float, ...], logits: str) -> Timing:
        facts = {"logits": logits, "first_step_seconds": "1", "versions": "v", "device": "cpu"}
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
    product = timing(versus_torchvision.PEAK, (0.5, 0.5, 0.5), "")
    product = dataclasses.replace(product, facts={**product.facts, "flops": "12"})
    rows = versus_torchvision.rows_of(case, [*timings, product])
    assert len(rows) == 12
    assert tuple(rows[0]) == versus_torchvision.COLUMNS
    assert rows[0]["logits_apart"] == "1.25e-01"
    assert (rows[0]["flops"], rows[-1]["flops"], rows[-1]["logits_apart"]) == ("", "12", "")


def test_contestants_take_turns_set_up_at_once() -> None:
    products = [
        Contestant(name, "benchmarks.workloads", "matrix_product", {"precision": "float32"})
        for name in ("one", "another")
    ]
    timings = time_in_turns(products, rounds=3, round_seconds=0.01, at_once=True)
    assert [timing.name for timing in timings] == ["one", "another"]
    for timing in timings:
        assert len(timing.seconds) == 3
        assert min(timing.seconds) > 0
        assert float(timing.facts["flops"]) == 2 * 2048**3


# Where the package is built for, it is a dependency: that it cannot be loaded there is a failure.
@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="oneDNN is for x86-64 Linux"
)
def test_the_librarys_share_of_a_step(tmp_path: pathlib.Path) -> None:
    """In a process of its own, whose library is watched for good."""
    path = tmp_path / "share.csv"
    flags = ["--arch=resnet20", "--image_size=16", "--batch_size=2", "--rounds=2", f"--csv={path}"]
    subprocess.run([sys.executable, "-m", "benchmarks.library_share", *flags], check=True)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["round"] for row in rows] == ["0", "1"]
    for row in rows:
        step, computing, reordering = (
            float(row[name]) for name in ("step_ms", "computing_ms", "reordering_ms")
        )
        assert min(computing, reordering) > 0
        assert computing + reordering < step
