"""The run of benchmarks/chaos.py, small: whatever happens to a fleet, a pod that is called exact is that."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SIZE = ["--pods", "8", "--seconds", "2", "--phases", "2"]


def test_who_is_called_exact_is_that():
    runs = [
        subprocess.Popen(
            [sys.executable, ROOT / "benchmarks" / "chaos.py", "--seed", str(seed), *SIZE],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for seed in (1, 2)
    ]
    try:
        told = [run.communicate(timeout=100)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
            run.wait()
    for run, printed in zip(runs, told, strict=True):
        assert run.returncode == 0, printed
        figures = dict(re.findall(r"^(\S.*?) {2,}(\S.*)$", printed, re.MULTILINE))
        assert figures["blocks wrong among exact"] == "0"
        assert figures["exact at quiet point 2"].startswith("4 of 4 replay whole")
        assert int(figures["injected: dropped"]) > 0
        assert int(figures["answers compared"]) > 0
