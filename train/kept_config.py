"""The flags of a run, kept in its working directory for whoever looks at it later."""

import dataclasses
import json
import os
import pathlib

from train.config import Config, parse
from train.errors import UsageError

_FILE = "config.json"
_OF_NO_RUN = ("suggest", "compare", "domain")  # flags that train nothing themselves


def keep_config(config: Config, workdir: str) -> None:
    """Writes them there, whole or not at all; of a run that is resumed those that it goes on with.

    Raises:
        UsageError: if the directory cannot be written to.
    """
    path = pathlib.Path(workdir, _FILE)
    part = path.with_suffix(".part")
    flags = {k: v for k, v in dataclasses.asdict(config).items() if k not in _OF_NO_RUN}
    try:
        part.write_text(json.dumps(flags, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise UsageError(f"--workdir={workdir}: {error.strerror}") from None


def config_of(workdir: pathlib.Path) -> Config:
    """The flags that a run was last started with, checked as a command line is.

    Raises:
        UsageError: for a directory without them, or with others than this version has.
    """
    path = workdir / _FILE
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        given = [f"--{name}={value}" for name, value in said.items() if value is not None]
    except OSError as error:
        raise UsageError(f"{workdir} is no run of train.main: {path}: {error.strerror}") from None
    except (ValueError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path}: not the flags of a run: {error}") from None
    try:
        return parse(given)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
