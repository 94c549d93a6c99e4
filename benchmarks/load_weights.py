"""Loading a .pth file: flaxcnn beside `torch.load`, time and peak memory.

    python -m benchmarks.load_weights --arch=vgg16

A file of random weights is written by torch, in its format of today (zip) and its old one (legacy).
Then each contestant loads it in a process of its own, in turns: flaxcnn from the file to the
variables of the network; torch by `torch.load(weights_only=True)` and a copy of each tensor, as
`load_state_dict` makes it. Imports and the network's tracing are outside of the time; the peak is
what resident memory grew by. The file is in the page cache for both.
"""

import argparse
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from benchmarks.machine import cpu_name
from benchmarks.row_files import write_csv

# Each is a program that gets the network and the file, and prints {"seconds", "peak_bytes"}.
MEASURE = """
import json, sys, time
arch, path = sys.argv[1:]
def resident(which):
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines[which].split()[0]) * 1024
{setup}
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
started = time.perf_counter()
{load}
seconds = time.perf_counter() - started
peak = resident("VmHWM") - before
print(json.dumps({{"seconds": seconds, "peak_bytes": peak}}))
"""
CONTESTANTS = {
    "flaxcnn": MEASURE.format(
        setup="""
import jax, flaxcnn
from flaxcnn import convert
jax.device_put(0.0)
convert.variable_shapes(flaxcnn.create_model(arch))
""",
        load="jax.block_until_ready(flaxcnn.load_pretrained(arch, path)[1])",
    ),
    "torch": MEASURE.format(
        setup="import torch",
        load="kept = {k: v.clone() for k, v in torch.load(path, weights_only=True).items()}",
    ),
}


def write_files(arch: str, folder: Path) -> dict[str, Path]:
    """Format -> a file of that network's weights, as torch draws them."""
    torch = importlib.import_module("torch")
    if importlib.util.find_spec("torchvision_cpu"):  # makes torchvision import beside a CPU torch
        importlib.import_module("torchvision_cpu")
    models = importlib.import_module("torchvision.models")
    state_dict = models.get_model(arch, weights=None).state_dict()
    files = {"zip": folder / "zip.pth", "legacy": folder / "legacy.pth"}
    for form, path in files.items():
        torch.save(state_dict, path, _use_new_zipfile_serialization=form == "zip")
    return files


def measure(contestant: str, arch: str, path: Path) -> dict[str, float]:
    """One process, one load."""
    command = [sys.executable, "-c", CONTESTANTS[contestant], arch, str(path)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the medians; writes one row for each load to `--csv`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="vgg16", help="network (vgg16)")
    parser.add_argument("--rounds", type=int, default=7, help="loads by each contestant (7)")
    parser.add_argument("--csv", type=Path, help="file to write the rounds to")
    options = parser.parse_args(arguments)
    cpu = cpu_name()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for form, path in write_files(options.arch, Path(folder)).items():
            for number in range(options.rounds):
                for name, version in (("flaxcnn", "jax"), ("torch", "torch")):
                    measured = measure(name, options.arch, path)
                    rows.append(
                        {
                            "arch": options.arch,
                            "format": form,
                            "file_mb": round(path.stat().st_size / 1e6),
                            "contestant": name,
                            "versions": f"{version} {metadata.version(version)}",
                            "cpu": cpu,
                            "round": number,
                            "seconds": round(measured["seconds"], 4),
                            "peak_mb": round(measured["peak_bytes"] / 1e6),
                        }
                    )
            for name in CONTESTANTS:
                mine = [r for r in rows if (r["format"], r["contestant"]) == (form, name)]
                seconds, peak = (
                    statistics.median(float(str(r[key])) for r in mine)
                    for key in ("seconds", "peak_mb")
                )
                print(f"{options.arch} {form}: {name} {seconds:.2f} s, peak {peak:.0f} MB")
    write_csv(options.csv, rows)


if __name__ == "__main__":
    main()
