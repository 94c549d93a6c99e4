"""The command as a user meets it: what it prints, writes and returns."""

import json
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
import runs
import tfds_shapes

from train import main, steps

LENET = ("--arch=lenet5", "--batch_size=32", "--log_every=5")


def test_a_run_from_beginning_to_end(tmp_path: pathlib.Path) -> None:
    flags = (*LENET, "--steps=20", "--eval_every=10", f"--workdir={tmp_path}")
    said = runs.run(*flags)
    for fact in (
        "lenet5, 60,850 parameters, 0.000327 GMACs an image",
        "digits, 1,437 training and 360 test images, 10 classes, 32x32",
        "small: 20 steps of 32",
        "step 20/20",
        "(360 images)",
    ):
        assert fact in said
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["split"] == "train"]
    test = [line for line in lines if line["split"] == "test"]
    assert [line["step"] for line in train] == [5, 10, 15, 20]
    assert [line["step"] for line in test] == [10, 20]
    assert set(train[0]) == {
        "split", "step", "epoch", "loss", "top1", "learning_rate", "images_per_second", "data_wait",
    }  # fmt: skip
    assert set(test[0]) == {"split", "step", "loss", "top1", "top5", "n"}
    assert {line["n"] for line in test} == {360}
    assert train[-1]["epoch"] == pytest.approx(20 * 32 / 1437)
    assert train[0]["loss"] > train[-1]["loss"]
    assert f"test accuracy {test[-1]['top1']:.2%} on 360 images" in said
    assert list((tmp_path / "tensorboard").glob("events*"))

    again = runs.run(*flags)
    assert "resumed after step 20" in again
    assert "already trained to its last step" in again
    assert f"test accuracy {test[-1]['top1']:.2%} on 360 images" in again
    assert runs.records(tmp_path) == [
        {k: v for k, v in line.items() if k not in runs.TIMINGS} for line in lines
    ]

    refused = runs.run(*flags, "--momentum=0.5", code=2)
    assert "momentum 0.9 there, 0.5 here" in refused


@pytest.mark.slow
def test_a_deep_network_of_2013_learns_from_the_small_recipe(tmp_path: pathlib.Path) -> None:
    """From its own start, N(0, 0.01) for pixels of 0 to 255, its loss stayed at ln 10."""
    said = runs.run(
        "--arch=zfnet", "--steps=45", "--log_every=15", "--eval_every=45", f"--workdir={tmp_path}"
    )
    assert "convolutions start he, dense layers start lecun" in said
    losses = [record["loss"] for record in runs.records(tmp_path, "train")]
    assert len(losses) == 3
    assert losses[-1] < 2.0 < losses[0]


def test_a_step_that_waits_for_the_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one would whose batch is not on the devices yet."""
    right = steps.train_over_devices

    def wrong(train_step: steps.TrainStep) -> steps.TrainStep:
        over_devices = right(train_step)
        return lambda state, batch: over_devices(
            state, {**batch, "label": np.asarray(batch["label"])}
        )

    monkeypatch.setattr(steps, "train_over_devices", wrong)
    with pytest.raises(RuntimeError, match=r"Disallowed (host-to-device|device-to-host) transfer"):
        main.command((*LENET, "--steps=2"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arch=resnet19"], "--arch: unknown model 'resnet19'; did you mean resnet18"),
        (["--batch_size=9"], "--batch_size=9 cannot be shared equally by 4 devices; try 8"),
        (["--data_dir=/absent"], "--data_dir=/absent: no such directory"),
        (["--image_size=16"], "--image_size=16 is too small for vgg16; its least size is 32"),
        (["--arch=vgg16", "--bn=sync"], "--bn=sync: vgg16 has no batch normalisation"),
        (["--process_id=0"], "go together; give all or none"),
        (
            ["--coordinator_address=host", "--num_processes=2", "--process_id=0"],
            "--coordinator_address=host: expected host:port",
        ),
        (["--arch=resnet18", "--batch_size=4"], "more than one value per channel"),
        (["--epochs=many"], "--epochs"),
        (["--workdir=pyproject.toml"], "--workdir=pyproject.toml"),
    ],
)
def test_a_wrong_value_is_one_line_and_exit_code_2(flags: list[str], message: str) -> None:
    process = runs.start(*flags, devices=4)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert message in err
    assert err.count("\n") == 1
    assert "first step" not in out


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: pathlib.Path) -> None:
    said = runs.run(*LENET, "--steps=50", "--learning_rate=1e30", f"--workdir={tmp_path}", code=1)
    assert "lower --learning_rate (now 1e+30)" in said
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.isdecimal()]


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_tells_how_to_resume(
    kind: signal.Signals, code: int, tmp_path: pathlib.Path
) -> None:
    flags = (*LENET, "--steps=400", f"--workdir={tmp_path}", "--eval_every=400")
    with runs.start(*flags) as process:
        for line in process.stdout or ():
            if line.startswith("step 10/"):
                process.send_signal(kind)
    assert process.returncode == code
    stopped = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdecimal()]
    assert len(stopped) == 1
    assert 10 <= stopped[0] < 400
    resumed = runs.run(*flags)
    assert f"resumed after step {stopped[0]}" in resumed
    steps = [record["step"] for record in runs.records(tmp_path, "train")]
    assert steps == list(range(5, 401, 5))


def test_a_run_stopped_before_an_evaluation_makes_up_for_it(tmp_path: pathlib.Path) -> None:
    """As a signal in mid-evaluation leaves it: the state is saved, the results are not there."""
    flags = (*LENET, "--steps=20", "--eval_every=10", f"--workdir={tmp_path}")
    runs.run(*flags)
    whole = runs.records(tmp_path)
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    assert "test accuracy" in runs.run(*flags)
    assert runs.records(tmp_path) == whole


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_a_tfds_data_set_trains_without_tensorflow(
    file_format: str, tmp_path: pathlib.Path
) -> None:
    tfds_shapes.prepare(tmp_path, file_format)
    program = (
        "import sys; from train.main import command; code = command(sys.argv[1:]); "
        "assert 'tensorflow' not in sys.modules; sys.exit(code)"
    )
    flags = (*LENET, "--dataset=tiny_shapes", "--image_size=32", f"--data_dir={tmp_path}")
    done = subprocess.run(
        [sys.executable, "-c", program, *flags, "--steps=30", "--bn=local"],
        cwd=runs.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tiny_shapes, 48 training and 10 test images, 2 classes, 32x32" in done.stdout
    assert "on 10 images" in done.stdout
