"""Compiles `repeats.c` beside its source when pip installs or builds flaxcnn: a hook of hatchling.

Only on what oneDNN's wheel is built for. Without a compiler the package is complete too: Python
does what is compiled, and takes longer.
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

_FLAGS = ["-O3", "-std=c11", "-fno-fast-math", "-fno-math-errno", "-fno-trapping-math"]
_SHARED = ["-fPIC", "-shared", "-pthread"]


class Compiling(BuildHookInterface):
    """Before a wheel is built, or an editable one."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if (sys.platform, platform.machine()) != ("linux", "x86_64"):
            return
        source = Path(self.root, "flaxcnn", "cpu", "repeats.c")
        compiled = source.with_name("librepeats.so")
        compiled.unlink(missing_ok=True)  # it may be of another version
        unfinished = source.with_name(f"librepeats.{os.getpid()}.so")
        checksum = f"-DSOURCE_CHECKSUM={zlib.crc32(source.read_bytes())}u"
        files = [str(source), "-o", str(unfinished)]
        try:
            compiler = shlex.split(os.environ.get("CC", "cc"))
            command = [*compiler, *_FLAGS, *_SHARED, checksum, *files]
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or error
            self.app.display_warning(f"not compiled, which costs speed: {source.name}: {said}")
            return
        unfinished.replace(compiled)
        build_data["artifacts"].append(f"/{compiled.relative_to(self.root)}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_')}"
