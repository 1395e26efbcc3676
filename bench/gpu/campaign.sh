#!/usr/bin/env bash
# bench/gpu/campaign.sh [--dry] [--seconds S] OUT [--again STAGE ...]: builds tdkern on a CUDA
# machine, proves it there and measures it (campaign.py says how).
# TDKERN_WHEELS names a folder of wheels for what the machine's python3 lacks; PYTHON another
# interpreter.
set -euo pipefail
PYTHON=${PYTHON:-python3}
if [[ -n "${TDKERN_WHEELS:-}" ]]; then
  site=$(mktemp -d)
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
    --target "$site" "$TDKERN_WHEELS"/*.whl
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
exec "$PYTHON" "$(dirname "$0")/campaign.py" "$@"
