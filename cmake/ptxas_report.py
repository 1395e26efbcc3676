"""Compiler launcher: runs nvcc and keeps what `ptxas -v` said of registers and spills, one file a
source.

ptxas_report.py DIR nvcc ARGUMENTS...
"""

import subprocess
import sys
from pathlib import Path

directory, *command = sys.argv[1:]
done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
source = next((Path(argument) for argument in command if argument.endswith(".cu")), None)
report = [
    line
    for line in done.stderr.splitlines()
    if line.startswith("ptxas info") or "bytes stack frame" in line
]
other = [line for line in done.stderr.splitlines() if line not in report]
if report and source:
    Path(directory).mkdir(parents=True, exist_ok=True)
    (Path(directory) / f"{source.stem}.txt").write_text("\n".join(report) + "\n")
if other:
    print("\n".join(other), file=sys.stderr)
sys.exit(done.returncode)
