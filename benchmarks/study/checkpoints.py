"""The routing of every checkpoint of a training run, on the text that the study profiles the demo model on.

    python -m benchmarks.study.checkpoints RUN --texts DIR [--device cuda] -o TRACES

RUN is what `exflow train configs/gpt-moe-demo.yaml -o RUN` made, with more checkpoint_steps if more are
wanted; `python -m benchmarks.study.run --training TRACES` then shows how affinity came about.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.study.data import demo_model
from exflow.errors import InputError


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--texts", type=Path, metavar="DIR", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("-o", "--output", type=Path, metavar="TRACES", required=True)
    given = parser.parse_args()
    found = sorted(given.run.glob("step-*"))
    if not found:
        parser.error(f"{given.run}: holds no checkpoints step-000000, ...; give the folder of a training run")
    for checkpoint in found:
        print(checkpoint.name, file=sys.stderr, flush=True)
        try:
            demo_model(given.texts, checkpoint, given.device).trace.save(given.output / checkpoint.name)
        except InputError as error:
            print(error, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
