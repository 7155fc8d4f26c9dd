# SPDX-License-Identifier: Apache-2.0
"""How long the help of the command line takes, beside that of another command of Optimum.

    python examples/benchmarks/startup.py [--repeats 15]

Pairs in turn, medians; the bar is 1.3. Help must not import torch.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from common import ratio_in_pairs, report

CLI = str(Path(sys.executable).with_name("optimum-cli"))
BASE = [CLI, "env", "--help"]
COMMANDS = {
    "optimum-cli moe-prune --help": [CLI, "moe-prune", "--help"],
    "optimum-cli moe-prune run --help": [CLI, "moe-prune", "run", "--help"],
    "python -m optimum_moe_prune --help": [sys.executable, "-m", "optimum_moe_prune", "--help"],
}


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def imports_torch(command: list[str]) -> bool:
    """Whether a command imports torch, by what the interpreter says of its imports."""
    traced = [sys.executable, "-X", "importtime", *command[command[0] == sys.executable :]]
    lines = subprocess.run(traced, check=True, capture_output=True, text=True).stderr.splitlines()
    return any(line.rpartition("|")[2].strip() == "torch" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    a = parser.parse_args()
    rows: list[dict[str, object]] = []
    for name, command in COMMANDS.items():
        mine, base, ratio = ratio_in_pairs(lambda c=command: run(c), lambda: run(BASE), a.repeats)
        torch = imports_torch(command)
        row: dict[str, object] = {"command": name, "seconds": mine, "optimum-cli env --help s": base}
        row |= {"imports torch": torch, "ratio": ratio, "bar": 1.3, "met": ratio <= 1.3 and not torch}
        rows.append(row)
    report("help of the command line", rows, vars(a), "ratio")


if __name__ == "__main__":
    main()
