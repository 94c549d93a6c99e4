"""Compiles `flaxcnn/cpu/repeats.c` beside its source, where oneDNN is installed and `cc` is found.

Without a compiler the package is complete too: Python does what is compiled, and takes longer.
"""

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_FLAGS = ["-O3", "-std=c11", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"]


class Compiling(BuildHookInterface):
    """Before a wheel is built, or an editable one."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if (sys.platform, platform.machine()) != ("linux", "x86_64"):
            return
        source = Path(self.root, "flaxcnn", "cpu", "repeats.c")
        compiled = source.with_name("librepeats.so")
        unfinished = compiled.with_suffix(f".{os.getpid()}")
        checksum = f"-DSOURCE_CHECKSUM={zlib.crc32(source.read_bytes())}u"
        compiler = shlex.split(os.environ.get("CC", "cc"))
        try:
            subprocess.run(
                [*compiler, *_FLAGS, checksum, str(source), "-o", str(unfinished)],
                check=True,
                capture_output=True,
                text=True,
            )
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or error
            self.app.display_warning(f"not compiled, which costs speed: {source.name}: {said}")
            return
        os.replace(unfinished, compiled)  # a process may have the one before
        build_data["artifacts"].append(f"/{compiled.relative_to(self.root)}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_')}"
