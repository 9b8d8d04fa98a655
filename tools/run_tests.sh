#!/usr/bin/env bash
# Lint and run the whole test suite, in the environment of quickstart.sh.
#
#     bash tools/run_tests.sh [arguments of pytest]
#
# Without arguments the tests run side by side, one process for each core, four at most.
set -euo pipefail

# shellcheck source=tools/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

prepare_environment tests.txt
cd "$REPO"
if ! "$PYTHON" -c 'import imagecorruptions, torchattacks' 2>/dev/null; then
    printf '\n== libraries that corrupt and attack; their tests skip without\n'
    "$PYTHON" -m pip install --disable-pip-version-check --quiet --no-deps \
        -r requirements/robustness.txt || true
fi
printf '\n== ruff\n'
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
printf '\n== pytest\n'
if (($# == 0)); then
    cores=$(env -u OMP_NUM_THREADS nproc)
    # Processes that take all cores each slow one another.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    set -- --numprocesses $((cores < 4 ? cores : 4)) --dist worksteal
fi
exec "$PYTHON" -m pytest "$@"
