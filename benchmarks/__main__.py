"""Every benchmark, one after the other: ``python -m benchmarks [--json]``."""

from __future__ import annotations

import argparse
import json

from benchmarks import keras_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = parser.parse_args().json
    results = {"keras_memory": keras_memory.measure(learners=300, warm_up=20, samples=100)}
    if as_json:
        print(json.dumps(results))
        return
    for name, figures in results.items():
        print(name)
        for key, value in figures.items():
            print(f"  {key:28} {value}")


if __name__ == "__main__":
    main()
