#!/usr/bin/env bash
# bench/gpu/evidence.sh [--dry] [--seconds S] [--from FOLDER] OUT: trains EDM, TD+EDM and windowed
# TD on CIFAR-10 on a CUDA machine, seed after seed, and scores their images (evidence.py says how).
# PYTHON names another interpreter.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/evidence.py" "$@"
