#!/usr/bin/env bash
# Lint and run the whole test suite, in the environment of quickstart.sh.
#
#     bash tools/run_tests.sh [arguments of pytest]
set -euo pipefail

# shellcheck source=tools/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

prepare_environment tests.txt
cd "$REPO"
printf '\n== ruff\n'
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
printf '\n== pytest\n'
exec "$PYTHON" -m pytest "$@"
