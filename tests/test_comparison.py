"""`--compare`: the candidates' runs, their table, the verdict."""

import pathlib

import pytest
import runs
from variables import random_variables

import flaxcnn
from flaxcnn.state_dicts import write_state_dict
from train import comparison, main
from train.advice import Candidate
from train.comparison import Measured, Outcome, verdict
from train.config import Config
from train.errors import DivergedError, UsageError


def measured(name: str, right: int, trained: int, n: int = 1000) -> Measured:
    return Measured(name, right / n, n, trained, 1.0)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        # Two standard errors at 80 % of 1,000 images are 3.6 points.
        ([("probe", 800, 10), ("all", 830, 99)], "probe; all is 3.0 points better, and 1000 test"),
        ([("probe", 800, 10), ("all", 850, 99)], "all, 5.0 points ahead of probe"),
        ([("probe", 850, 10), ("all", 800, 99)], "probe, 5.0 points ahead of all"),
        ([("a", 1000, 10), ("b", 1000, 9)], "b; a is 0.0 points better"),
        ([("alone", 500, 10)], "alone"),
    ],
)
def test_verdict(rows: list[tuple[str, int, int]], said: str) -> None:
    assert verdict([measured(*row) for row in rows]).startswith(f"verdict: {said}")


def test_verdict_of_what_diverged() -> None:
    diverged = Measured("all", None, 0, None, None)
    assert verdict([diverged]) == "verdict: none; every loss ceased to be finite"
    assert verdict([diverged, measured("probe", 500, 10)]) == "verdict: probe"


WAYS = [Candidate("first way", Config(workdir="w")), Candidate("second", Config(workdir="w"))]


def test_a_run_that_diverges_is_a_row_and_one_that_is_stopped_the_end() -> None:
    said: list[str] = []
    seen: list[Config] = []

    def diverge(config: Config) -> Outcome:
        seen.append(config)
        if len(seen) == 1:
            raise DivergedError("the loss is nan")
        return Outcome(0, {"top1": 0.5, "n": 360}, 12345, resumed=True)

    assert comparison.compare(WAYS, diverge, said.append) == 0
    assert [config.workdir for config in seen] == ["w/first_way", "w/second"]
    assert "first way: the loss is nan" in said
    table = "\n".join(said)
    assert "50.00%                       12,345" in table  # without the time of a resumed run
    assert "verdict: second" in table

    seen.clear()
    stopped = Outcome(143, None, 0, resumed=False)
    code = comparison.compare(WAYS, lambda config: (seen.append(config), stopped)[1], said.append)
    assert (code, len(seen)) == (143, 1)


def test_one_process_only() -> None:
    ways = [Candidate("probe", Config(num_processes=2))]
    with pytest.raises(UsageError, match="--compare is for one process"):
        comparison.compare(ways, lambda config: pytest.fail("run"), print)


@pytest.mark.slow
def test_candidates_run(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    variables = random_variables(flaxcnn.create_model("lenet5", num_classes=7), (1, 32, 32, 3))
    write_state_dict(tmp_path / "w.pth", flaxcnn.to_torchvision("lenet5", variables))
    flags = (
        *("--arch=lenet5", f"--weights={tmp_path}/w.pth", "--epochs=1"),
        *("--compare", "--domain=far", f"--workdir={tmp_path}/all"),
    )
    assert main.command(flags) == 0
    out, _ = capsys.readouterr()
    rows = {line[:12].strip(): line.split() for line in out.splitlines()[-6:-1]}
    assert rows["linear probe"][-1] == "850"  # 84 features and a bias, ten classes
    assert rows["tune all"][-1] == rows["from scratch"][-1] == "60,850"
    assert 850 < int(rows["tune the top"][-1].replace(",", "")) < 60_850
    assert out.splitlines()[-1].startswith("verdict: ")
    for name, row in rows.items():
        folder = tmp_path / "all" / name.replace(" ", "_")
        if folder.is_dir():
            last = runs.records(folder, "test")[-1]
            assert f"{last['top1']:.2%}" in row
