"""The report of a run: its numbers are those of the run, and any class name is shown as it is."""

import json
import pathlib
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import runs

from train import datasets, kept_config, report, report_page
from train.config import parse
from train.errors import UsageError

FLAGS = ("--arch=lenet5", "--steps=60", "--eval_every=20", "--log_every=10", "--batch_size=32")


@pytest.fixture(name="run", scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("run")
    runs.run(*FLAGS, f"--workdir={workdir}")
    return workdir


class Parts(HTMLParser):
    """The tags of a page, balanced where they have to be, and all that it refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.count: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag in ("table", "div", "figure", "svg", "tr", "style"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("table", "div", "figure", "svg", "tr", "style"):
            assert self.open.pop() == tag


def parsed(page: str) -> Parts:
    parts = Parts()
    parts.feed(page)
    assert not parts.open
    assert all(link.startswith("data:image/png;base64,") for link in parts.links)  # opens offline
    assert "http" not in page.replace("<!DOCTYPE html>", "")
    return parts


# ------------------------------------------------------------------------------------- of a run
@pytest.mark.slow
def test_the_report_has_the_runs_numbers(
    run: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.command([str(run), "--worst=5"]) == 0
    best = max(record["top1"] for record in runs.records(run, "test"))
    assert f"{best:.2%}" in capsys.readouterr().out
    page = (run / "report.html").read_text()
    assert f"<b>{best:.2%}</b>" in page
    parts = parsed(page)
    assert parts.count["img"] == 5
    assert parts.count["circle"] == 2 * 3

    found = report.findings(run, 1000)
    assert found.confusion.sum() == 360
    labels = datasets.load("digits", None, "train", None).test.labels
    np.testing.assert_array_equal(found.confusion.sum(1), np.bincount(labels))
    assert np.trace(found.confusion) == round(best * 360)
    assert len(found.mistakes) == 360 - np.trace(found.confusion)
    for mistake in found.mistakes:
        number = int(mistake.name.removeprefix("image "))
        assert labels[number] == mistake.label != mistake.guess
    confidences = [mistake.confidence for mistake in found.mistakes]
    assert confidences == sorted(confidences, reverse=True)


@pytest.mark.slow
def test_wrong_requests(
    run: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def complaint(*arguments: str) -> str:
        assert report.command(arguments) == 2
        out, err = capsys.readouterr()
        assert not out
        assert err.count("\n") == 1
        return err

    assert f"{tmp_path} is no run of train.main" in complaint(str(tmp_path))
    assert "--worst must be at least 0" in complaint(str(run), "--worst=-1")
    assert "no such directory" in complaint(str(run), f"--output={tmp_path}/gone/r.html")
    config = run / "config.json"
    whole = config.read_text()
    try:
        for content in ("", "[]", "7", '{"arch": ', "[" * 100_000):
            config.write_text(content)
            assert "config.json: not the flags of a run" in complaint(str(run))
        config.write_text('{"colour": "red"}')
        assert "config.json: " in complaint(str(run))
        config.write_text(json.dumps({**json.loads(whole), "max_bad": 1}))
        assert "--max_bad is for --dataset=folder" in complaint(str(run))
    finally:
        config.write_text(whole)


def test_flags_are_kept(tmp_path: pathlib.Path) -> None:
    config = parse(["--arch=vgg11", "--flip=True", "--head_lr_scale=2.5", "--data_dir=a b=c\n'"])
    kept_config.keep_config(config, str(tmp_path))
    assert kept_config.config_of(tmp_path) == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    with pytest.raises(UsageError, match="gone"):
        kept_config.keep_config(config, str(tmp_path / "gone"))


# ------------------------------------------------------------------------------------- the page
def made(classes: int, **others: object) -> report_page.Findings:
    rng = np.random.default_rng(0)
    records = [{"split": "train", "step": s, "loss": 2 / s, "top1": 0.1 * s} for s in (1, 2, 3)]
    found = report_page.Findings(
        title="a net on data",
        class_names=[f"class {i}" for i in range(classes)],
        records=records,
        confusion=rng.integers(0, 9, (classes, classes)) + 30 * np.eye(classes, dtype=int),
        mistakes=[],
    )
    return found._replace(**others)


def test_names_cannot_change_the_page() -> None:
    hostile = ['<script>alert("x")</script>', "a & b </table>", "' onload='x"]
    mistakes = [report_page.Mistake("<i>.jpg", b"png", 0, 1, 0.9)]
    page = report_page.page(made(3, class_names=hostile, title="</title><b>", mistakes=mistakes))
    parts = parsed(page)
    assert "script" not in parts.count
    assert "&lt;i&gt;.jpg" in page
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;, taken for a &amp; b" in page


def test_per_class_numbers_by_hand() -> None:
    confusion = np.array([[8, 2, 0], [5, 5, 0], [0, 0, 0]])
    page = report_page.page(made(3, confusion=confusion))
    rows = re.findall(r'<tr><td class="name">(.*?)</tr>', page)
    assert [re.split(r"</?td>+", row.replace("</td><td>", "|")) for row in rows][:3] == [
        ["class 1|10|5|50.0%|71.4%", ""],
        ["class 0|10|8|80.0%|61.5%", ""],
        ["class 2|0|0|none|none", ""],
    ]
    assert rows[3].startswith("class 1, taken for class 0</td><td>5</td><td>50.0%")
    assert rows[4].startswith("class 0, taken for class 1</td><td>2</td><td>20.0%")
    assert len(rows) == 5
    assert "<b>65.00%</b>" in page


@pytest.mark.parametrize("records", [[], [{"split": "test", "step": 5, "loss": 0.0, "top1": 0.0}]])
def test_runs_that_logged_little(records: list[dict[str, object]]) -> None:
    parsed(report_page.page(made(2, records=records)))


def test_a_matrix_of_many_classes_is_left_out() -> None:
    assert 'class="matrix"' in report_page.page(made(40))
    many = report_page.page(made(41))
    assert 'class="matrix"' not in many
    assert "class 7" in many


def test_nothing_is_mistaken() -> None:
    page = report_page.page(made(2, confusion=np.diag([3, 4])))
    assert "<b>100.00%</b>" in page
    assert "Nothing is mistaken." in page
