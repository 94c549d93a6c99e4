"""What `python -m flaxcnn` says to wrong input."""

import pytest

from flaxcnn.__main__ import main


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said, on one line, to arguments that end with code 2."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("python -m flaxcnn: ")
    return err
