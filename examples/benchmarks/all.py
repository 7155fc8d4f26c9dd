# SPDX-License-Identifier: Apache-2.0
"""Every benchmark, one after another, and one table of what was measured beside its bar.

    python examples/benchmarks/all.py [--scale 0.08] [--folder DIR] [--only paths startup] [--quick]
        [--write examples/benchmarks/README.md]
    python examples/benchmarks/all.py --device cuda       # what concerns a GPU, in less than five minutes

They need a machine with nothing else to do. The exit code is 1 where a bar is missed. ``--quick`` shrinks all shapes
until the scripts take seconds: it shows that they run, and its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import report

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from blocks import markdown, write_block  # noqa: E402

NAMES = ("startup", "paths", "selection", "calibration", "kept_tokens", "precision", "memory", "surgery", "large")
ON_A_GPU = {"calibration": "--repeats 2", "large": "--scale 0.25 --budget 110"}
SMALL_MODEL = "--hidden 128 --width 128 --layers 2"
QUICK = {
    "startup": "--repeats 2",
    "paths": "--layers 6 --experts 16 --top-k 2 --samples 16 --paths 50 --many-layers 6 --many-paths 200",
    "selection": f"{SMALL_MODEL} --tokens 512 --kept 256 --model-hidden 64 --mixtral-layers 4 --many-experts 32 "
    "--report-layers 3",
    "calibration": f"{SMALL_MODEL} --tokens 1024 --repeats 2",
    "kept_tokens": "--models mixtral --methods pathfinder --draws 2 --samples 1 --heldout 2",
    "precision": f"{SMALL_MODEL} --experts 8 --top-k 2 --tokens 1024 --repeats 1 --models",
    "memory": f"{SMALL_MODEL} --tokens 4096 --experts 16 --top-k 2",
    "surgery": "--gigabytes 0.03 --hidden 256 --repeats 2",
    "large": "--tokens 512 --length 256",
}


def run(name: str, arguments: list[str]) -> tuple[list[dict[str, Any]], bool]:
    """The JSON lines a script prints, and whether it ended well; its tables go on to the terminal."""
    found = []
    command = [sys.executable, str(HERE / f"{name}.py"), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"benchmark"'):
                found.append(json.loads(line))
            else:
                print(line, end="", flush=True)
    return found, process.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=0.08, help="of the large checkpoint")
    parser.add_argument("--folder", type=Path, help="on the disk to use; a temporary one by default")
    parser.add_argument("--only", nargs="+", choices=NAMES, help="by default all that concern the device")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="put the table into this file's block")
    parser.add_argument("--quick", action="store_true", help="shapes that only show that the scripts run")
    a = parser.parse_args()
    rows: list[dict[str, object]] = []
    settings: dict[str, Any] = vars(a)
    for name in a.only or (NAMES if a.device == "cpu" else ON_A_GPU):
        arguments = QUICK[name].split() if a.quick else []
        if a.device != "cpu" and name in ON_A_GPU:
            arguments += ["--device", a.device, *(() if a.quick else ON_A_GPU[name].split())]
        if name == "large" and (a.quick or a.device == "cpu"):
            arguments += ["--scale", "0.005" if a.quick else str(a.scale)]
        if a.folder is not None and name in ("memory", "surgery", "large"):
            arguments += ["--folder", str(a.folder)]
        told, well = run(name, arguments)
        for result in told:
            for row in result["rows"]:
                if row[result["bar"]] == "":
                    continue
                columns = [k for k in row if isinstance(row[k], str)]
                what = ", ".join(str(row[column]) for column in columns if row[column] != "")
                cells = {"what": f"{result['benchmark']}: {what}", "measured": row[result["measured"]]}
                rows.append({**cells, "in": result["measured"], "bar": row[result["bar"]], "met": row["met"]})
        if not well:
            rows.append({"what": f"{name}.py failed", "measured": "", "in": "", "bar": "", "met": False})
    if a.write is not None:
        head = ["what", "measured", "in", "bar", "met"]
        lines = [[f"{row[key]:.3g}" if isinstance(row[key], float) else str(row[key]) for key in head] for row in rows]
        write_block(a.write, "all benchmarks", markdown(head, lines))
    report("all benchmarks", rows, settings, "measured")
    if not all(row["met"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
