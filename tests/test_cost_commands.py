"""`python -m flaxcnn models|summary|stack|scaling|plot`: what they answer."""

import csv
import io
import json
import math
import pathlib
import subprocess
import sys
from typing import Any

import pytest
from complaints import complaint

import flaxcnn
from flaxcnn import efficientnet
from flaxcnn.__main__ import main
from flaxcnn.accounting import costs
from flaxcnn.commands import options, scaling


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert not err
    return out


def records(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    found = json.loads(said(capsys, *arguments, "--format=json"))
    assert isinstance(found, list)
    return found


# ---------------------------------------------------------------------------------------- models
def test_models_within_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    """The best published accuracy first, those without any last."""
    budget = ("--max-gmacs=1", "--max-params=10M", "--max-memory=100MB")
    rows = records(capsys, "models", *budget, "--sort=acc@1")
    assert [row["network"] for row in rows[:3]] == [
        "efficientnet_b1",
        "efficientnet_b0",
        "efficientnet_lite0",
    ]
    assert [row["acc@1"] for row in rows[:4]] == [79.838, 77.692, 75.1, None]
    expected = {
        name
        for name in flaxcnn.list_models()
        if (cost := costs.cost(name)).params <= 1e7
        and cost.macs <= 1e9
        and cost.forward_bytes <= 1e8
    }
    assert {row["network"] for row in rows} == expected
    for row in rows:
        cost = costs.cost(row["network"])
        assert row["forward_mb"] == pytest.approx(cost.forward_bytes / 1e6)
        assert row["training_mb"] == pytest.approx(cost.training_bytes / 1e6)


@pytest.mark.parametrize(
    ("flag", "value", "field"),
    [
        ("--max-params", 25_557_032, "params"),
        ("--max-gmacs", 4.089184256, "macs"),
        ("--max-memory", costs.cost("resnet50").forward_bytes, "forward_bytes"),
    ],
)
def test_each_budget_counts(
    flag: str, value: float, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """resnet50 costs just so much."""
    largest = getattr(costs.cost("resnet50"), field)
    found = {row["network"] for row in records(capsys, "models", f"{flag}={value}")}
    assert found == {
        name for name in flaxcnn.list_models() if getattr(costs.cost(name), field) <= largest
    }
    assert "resnet50" in found
    tighter = records(capsys, "models", f"{flag}={0.999 * value}")
    assert "resnet50" not in {row["network"] for row in tighter}


@pytest.mark.parametrize(
    ("key", "column"),
    [("params", "params"), ("gmacs", "gmacs"), ("memory", "forward_mb"), ("name", "network")],
)
def test_models_are_sorted(key: str, column: str, capsys: pytest.CaptureFixture[str]) -> None:
    values = [row[column] for row in records(capsys, "models", "--family=vgg", f"--sort={key}")]
    assert values == sorted(values)
    assert len(values) == 9


def test_models_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    title, rule, *rows = said(capsys, "models", "--family=alexnet").splitlines()
    assert title.split("  ")[0] == "network"
    assert set(rule) == {"-", " "}
    assert rows[0].split() == ["alexnet", "61,100,840", "0.714", "224", "246", "736", "56.52"]
    assert rows[1].split()[:2] == ["alexnet_2012", "60,965,224"]
    assert len(rows) == 2


def test_budgets_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert "raise --max-params" in complaint(capsys, "models", "--family=vgg", "--max-params=1k")
    for flag in ("--max-params=x", "--max-memory=10XB", "--max-gmacs=-1", "--max-memory=nan"):
        with pytest.raises(SystemExit):
            main(["models", flag])
        assert "is no" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- summary
def test_summary_in_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    command = ("summary", "vgg11", "--image-size=64", "--batch-size=2")
    summary = flaxcnn.summarize("vgg11", image_size=64, batch_size=2)
    assert said(capsys, *command) == f"{summary}\n"
    assert said(capsys, *command, "--format=markdown") == f"{summary.to_markdown()}\n"
    assert said(capsys, *command, "--format=csv") == f"{summary.to_csv()}\n"
    found = json.loads(said(capsys, *command, "--format=json"))
    assert found == json.loads(json.dumps(summary.to_dict()))

    stages = said(capsys, *command, "--stages")
    assert "features_0" not in stages
    assert "parameters: 132,863,336" in stages
    assert "features_0" not in said(capsys, *command, "--stages", "--format=markdown")
    rows = list(csv.DictReader(io.StringIO(said(capsys, *command, "--stages", "--format=csv"))))
    assert [row["name"] for row in rows] == [stage.name for stage in summary.stages]
    found = json.loads(said(capsys, *command, "--stages", "--format=json"))
    assert "layers" not in found
    assert len(found["stages"]) == 6


def test_numbers_with_units() -> None:
    assert options.number("10M") == 1e7
    assert options.number("1B") == 1e9
    assert options.bytes_number("100MB") == 1e8
    assert options.bytes_number("1GiB") == 2**30
    assert options.bytes_number("1.5k") == 1500


def test_images_that_nobody_has(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        ("summary", "vgg16", "--image-size=65537"),
        ("stack", "3x3", "--size=99999999"),
    ):
        with pytest.raises(SystemExit):
            main(command)
        assert "is more than 65,536" in capsys.readouterr().err


@pytest.mark.slow
def test_output_that_cannot_be_written() -> None:
    command = f"{sys.executable} -m flaxcnn models --family=vgg"
    full = subprocess.run(f"{command} > /dev/full", shell=True, capture_output=True, text=True)
    assert (full.returncode, full.stderr) == (1, "python -m flaxcnn: No space left on device\n")
    closed = subprocess.run(f"{command} >&-", shell=True, capture_output=True, text=True)
    assert (closed.returncode, closed.stderr) == (0, "")


def test_wrong_summaries(capsys: pytest.CaptureFixture[str]) -> None:
    assert "at least 32x32" in complaint(capsys, "summary", "vgg16", "--image-size=31")
    assert "did you mean vgg" in complaint(capsys, "summary", "vgg61")


# ----------------------------------------------------------------------------------------- stack
def test_why_3x3(capsys: pytest.CaptureFixture[str]) -> None:
    """Section 2.3 of the VGG paper."""
    command = ("stack", "5x5", "--vs", "3x3", "3x3", "--channels=64", "--size=56")
    one, two = records(capsys, *command)
    assert (one["receptive_field"], two["receptive_field"]) == (5, 5)
    assert (one["params_formula"], two["params_formula"]) == ("25 C^2", "18 C^2")
    assert (one["macs_formula"], two["macs_formula"]) == ("25 C^2 HW", "18 C^2 HW")
    assert (one["output_formula"], two["output_formula"]) == ("HWC", "2 HWC")
    assert (one["params"], two["params"]) == (25 * 64**2, 18 * 64**2)
    assert (one["macs"], two["macs"]) == (25 * 64**2 * 56**2, 18 * 64**2 * 56**2)
    assert (one["output_bytes"], two["output_bytes"]) == (4 * 56**2 * 64, 8 * 56**2 * 64)
    table = said(capsys, *command).splitlines()
    assert table[0] == "C = 64 channels, H = W = 56"
    assert "18 C^2 HW" in table[-1]


def test_strides_and_dilations(capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = records(
        capsys, "stack", "7x7/2", "--vs", "3x3/2", "3x3", "--vs", "3x3@2", "1x7", "--size=32"
    )
    assert first["macs_formula"] == "49/4 C^2 HW"
    assert first["macs"] == 49 * 64**2 * 16**2
    assert (second["receptive_field"], second["params_formula"]) == (7, "18 C^2")
    assert (second["macs_formula"], second["output_formula"]) == ("9/2 C^2 HW", "1/2 HWC")
    assert second["stack"] == "3x3/2, 3x3"
    assert (third["receptive_field"], third["params"]) == ([5, 11], 16 * 64**2)
    (even,) = records(capsys, "stack", "2x2", "4x4", "--size=32")
    assert (even["receptive_field"], even["output_bytes"]) == (5, 2 * 4 * 32 * 32 * 64)


@pytest.mark.parametrize("wrong", ["3", "3x", "x3", "3x3x3", "0x3", "3x3/0", "3x3@", "a3x3"])
def test_what_is_no_convolution(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no convolution such as 3x3" in complaint(capsys, "stack", wrong)


# --------------------------------------------------------------------------------------- scaling
@pytest.mark.slow
def test_scaling(capsys: pytest.CaptureFixture[str]) -> None:
    rows = records(capsys, "scaling")
    assert [row["phi"] for row in rows[:5]] == [0, 0.5, 1, 2, 3.25]
    assert [row["by_formula"] for row in rows] == ["yes"] * 5 + ["no"] * 3
    assert [row["resolution"] for row in rows] == [224, 240, 260, 300, 380, 456, 528, 600]
    for row in rows:
        summary = flaxcnn.summarize(row["network"], image_size=row["resolution"])
        assert (row["params"], row["gmacs"]) == (summary.params, summary.macs / 1e9)
        assert row["growth"] == pytest.approx(row["gmacs"] / rows[0]["gmacs"])
        assert row["two_to_phi"] == pytest.approx(2 ** row["phi"])
    assert rows[-1]["acc@1"] == 84.122


def test_phi_of_what_the_formula_gives() -> None:
    for phi in (0.75, 2.5, 4.0):
        exact = efficientnet.compound_scaling(phi)
        resolution = round(224 * exact.resolution)
        found = scaling.each_phi(exact.depth, exact.width, resolution)
        assert found == pytest.approx([phi] * 3, abs=0.01)
        rounded = (round(exact.depth, 1), round(exact.width, 1))
        assert math.isclose(scaling.formula_phi(*rounded, resolution) or -1, phi)
    assert scaling.formula_phi(1.0, 2.0, 224) is None


# ------------------------------------------------------------------------------------------ plot
def test_plots_are_written(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib, which is not installed")
    for what in ("layers", "receptive-field"):
        path = tmp_path / f"{what}.svg"
        command = ("plot", what, "--arch", "alexnet", "lenet5", "--out", str(path), "--dark")
        assert said(capsys, *command) == f"{path}\n"
        assert path.read_text().startswith("<?xml")
    assert "--arch and --image-size are of others" in complaint(
        capsys, "plot", "models", "--arch", "vgg16", "--out", str(tmp_path / "x.png")
    )
    assert "a picture is a file of" in complaint(capsys, "plot", "models", "--out", "x.gif")
    assert not (tmp_path / "x.png").exists()
