"""Compiles the C sources, beside them, when pip installs or builds flaxcnn: a hook of hatchling.

Only on what oneDNN's wheel is built for. Without a compiler the package is complete too: Python
and oneDNN do what is compiled, and take longer.
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
        folder = Path(self.root, "flaxcnn", "cpu")
        sources = [folder / name for name in ("repeats.c", "winograd.c")]  # as `compiled` has them
        compiled = folder / "libcompiled.so"
        compiled.unlink(missing_ok=True)  # it may be of another version
        unfinished = folder / f"libcompiled.{os.getpid()}.so"
        checksum = zlib.crc32(b"".join(source.read_bytes() for source in sources))
        files = [*map(str, sources), "-o", str(unfinished)]
        try:
            compiler = shlex.split(os.environ.get("CC", "cc"))
            defined = f"-DSOURCES_CHECKSUM={checksum}u"
            command = [*compiler, *_FLAGS, *_SHARED, defined, *files]
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or error
            self.app.display_warning(f"not compiled, which costs speed: {said}")
            return
        unfinished.replace(compiled)
        build_data["artifacts"].append(f"/{compiled.relative_to(self.root)}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_')}"
