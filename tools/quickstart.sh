#!/usr/bin/env bash
# Install what is needed and Pro-tune Mask R-CNN on a few hundred images, without a GPU.
#
#     bash tools/quickstart.sh                  # drawn shapes
#     bash tools/quickstart.sh --data FOLDER    # any COCO-format folder with masks
#
# Needs CPython 3.10 to 3.12, a C++ compiler and PyPI. See --help for the other options.
set -euo pipefail

# shellcheck source=tools/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

for argument in "$@"; do
    case $argument in
        # Nothing needs to be installed for this.
        -h | --help)
            base=$(find_python)
            exec "$base" "$REPO/tools/quickstart.py" --help
            ;;
    esac
done
# shellcheck disable=SC2119  # the arguments are those of the Python script
prepare_environment
exec "$PYTHON" "$REPO/tools/quickstart.py" "$@"
