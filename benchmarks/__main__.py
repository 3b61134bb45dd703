"""Every benchmark, one after the other, each in a process of its own: ``python -m benchmarks [--json] [--full]``."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from benchmarks.harness import ROOT

MODULES = (
    "local_training",
    "private_training",
    "whole_round",
    "shared_round",
    "aggregation",
    "cloning",
    "serving",
    "encoding",
    "main_training",
    "keras_memory",
    "privacy_audit",
    "privacy_utility",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object: figures by benchmark")
    parser.add_argument("--full", action="store_true", help="the sizes of docs/performance.md instead of quick ones")
    options = parser.parse_args()
    sizes = ["--full"] if options.full else []
    if options.json:
        print(json.dumps({name: json.loads(_output(name, ["--json", *sizes])) for name in MODULES}))
        return
    for name in MODULES:
        print(_output(name, sizes), flush=True)


def _output(name: str, arguments: list[str]) -> str:
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


if __name__ == "__main__":
    main()
