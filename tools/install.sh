#!/usr/bin/env bash
# Make the environment of quickstart.sh and run_tests.sh. Source it, then call
#
#     prepare_environment [more requirements files, such as tests.txt]
#
# It uses the active virtual environment, or makes .venv in the root of the repository, and leaves
# the path of its interpreter in $PYTHON. An environment that is as it should be is left alone.
set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
REQUIREMENTS=$REPO/requirements
MMCV=2.1.0
PYTHON=
OPS=cpu # or cuda: which of mmcv's ops are looked for

say() { printf '%s\n' "$*"; }

step() { printf '\n== install %s/6: %s\n' "$1" "$2"; }

fail() {
    printf '\nerror: %s\n' "$1" >&2
    shift
    if (($#)); then printf '       %s\n' "$@" >&2; fi
    exit 1
}

duration() { printf '%d min %02d s' $(($1 / 60)) $(($1 % 60)); }

prepare_environment() {
    local begin=$SECONDS prefix state extra missing=()
    choose_environment
    prefix=$("$PYTHON" -c 'import sys; print(sys.prefix)')
    state=$(fingerprint)
    if ! is_done "$prefix" base "$state"; then
        refuse_conflicts
        rm -f "$prefix"/.protune_mm-*
        install_stack
        printf '%s\n' "$state" >"$prefix/.protune_mm-base"
    fi
    for extra in "$@"; do
        if ! is_done "$prefix" "$extra" "$state"; then missing+=("$extra"); fi
    done
    for extra in ${missing[@]+"${missing[@]}"}; do
        printf '\n== install: %s\n' "requirements/$extra"
        pip_install -r "$REQUIREMENTS/$extra"
        printf '%s\n' "$state" >"$prefix/.protune_mm-$extra"
    done
    if ((SECONDS - begin > 10)); then
        printf '\n== install: ready after %s\n' "$(duration $((SECONDS - begin)))"
    fi
}

choose_environment() {
    local base made=$REPO/.venv/.made_by_protune_mm
    if [[ -n ${VIRTUAL_ENV:-} ]]; then
        PYTHON=$VIRTUAL_ENV/bin/python
        supported "$PYTHON" || fail \
            "the active virtual environment, $VIRTUAL_ENV, has $("$PYTHON" --version 2>&1 || true)." \
            'CPython 3.10, 3.11 or 3.12 is needed: deactivate it, or activate another.'
        "$PYTHON" -c 'import pip' 2>/dev/null || fail \
            "the active virtual environment, $VIRTUAL_ENV, has no pip." \
            "Run '$PYTHON -m ensurepip' and then this again."
    else
        PYTHON=$REPO/.venv/bin/python
        if ! { [[ -x $PYTHON ]] && supported "$PYTHON" && "$PYTHON" -c 'import pip' 2>/dev/null; }; then
            # One of this script has a mark; another one is its user's, with all that is in it.
            if [[ -n $(ls -A "$REPO/.venv" 2>/dev/null) && ! -e $made && ! -e $REPO/.venv/.protune_mm-base ]]; then
                fail "$REPO/.venv is an environment without pip, or of another Python than CPython" \
                    '3.10, 3.11 or 3.12, and not made by this script: remove it, or activate another.'
            fi
            base=$(find_python)
            # Debian's Python makes no environment until python3-venv is installed.
            "$base" -c 'import ensurepip' 2>/dev/null || fail \
                "$base has no ensurepip, so it cannot make a virtual environment." \
                'Debian: apt-get install python3-venv, then run this again.'
            say "Making $REPO/.venv with $base"
            # What --clear does, but for the mark, so that one that is cut off is known, too.
            mkdir -p "$REPO/.venv"
            touch "$made"
            find "$REPO/.venv" -mindepth 1 ! -path "$made" -delete
            "$base" -m venv "$REPO/.venv"
        fi
    fi
    say "Environment: $("$PYTHON" -c 'import sys; print(sys.prefix)'), $("$PYTHON" --version)"
}

# Whether an interpreter runs and is one of the supported versions.
supported() {
    "$1" -c 'import sys; sys.exit(not ((3, 10) <= sys.version_info[:2] <= (3, 12) \
        and sys.implementation.name == "cpython"))' 2>/dev/null
}

# The default Python where it fits, else another one on the path.
find_python() {
    local name
    for name in python3 python python3.12 python3.11 python3.10; do
        if command -v "$name" >/dev/null && supported "$name"; then
            command -v "$name"
            return
        fi
    done
    name=$(python3 --version 2>&1) || name='no Python'
    fail "CPython 3.10, 3.11 or 3.12 is needed; the default here is ${name}," \
        'and none of python3.12, python3.11 and python3.10 runs.' \
        'Install one with its venv and dev packages (python3.12 python3.12-venv python3.12-dev),' \
        'or activate a virtual environment that has one, and run this again.'
}

# What an environment must have been installed from, so that a second run has nothing to do.
fingerprint() {
    (
        cd "$REPO"
        "$PYTHON" -c 'import sys; print(sys.version, sys.prefix)'
        printf '%s\n' "$REPO" "${FORCE_CUDA:-0}"
        cat tools/install.sh requirements/*.txt setup.py pyproject.toml protune_mm/version.py
    ) | sha256sum | cut -d' ' -f1
}

is_done() { [[ -f $1/.protune_mm-$2 && $(<"$1/.protune_mm-$2") == "$3" ]]; }

# Packages that the stack cannot live beside; only somebody's own environment can have them.
refuse_conflicts() {
    local found
    found=$("$PYTHON" -c '
from importlib.metadata import distributions
names = {(d.metadata["Name"] or "").lower() for d in distributions()}
print(*sorted(n for n in names if n == "transformers" or n.startswith("onedl-mm")))')
    if [[ -n $found ]]; then
        fail "the environment has $found." \
            'mmpretrain 1.2.0 fails to import beside transformers, and the onedl libraries own the' \
            'folders of those installed here. Use another environment, or uninstall them.'
    fi
}

pip_install() {
    "$PYTHON" -m pip install --disable-pip-version-check \
        --constraint "$REQUIREMENTS/pinned.txt" "$@"
}

install_stack() {
    step 1 'pip, setuptools and the build tools'
    pip_install -r "$REQUIREMENTS/build.txt"
    step 2 'PyTorch'
    pip_install -r "$REQUIREMENTS/torch.txt"
    step 3 'what the OpenMMLab libraries need'
    # mmcv has no part here: pip would build it in isolation, which leaves its ops out.
    pip_install -r "$REQUIREMENTS/runtime.txt" 'mmengine>=0.10,<0.11' addict packaging pillow \
        pyyaml yapf
    step 4 "mmcv $MMCV with its ops"
    install_mmcv
    step 5 'MMDetection, MMSegmentation and MMPretrain'
    pip_install -r "$REQUIREMENTS/openmmlab.txt"
    step 6 'protune_mm itself, editable'
    "$PYTHON" -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e "$REPO"
    "$PYTHON" -m pip check ||
        say 'pip finds the conflicts above in this environment; going on.'
}

install_mmcv() {
    local wheels forced=${FORCE_CUDA:-0}
    if [[ $forced == 1 ]]; then
        OPS=cuda
    elif mmcv_works 2>/dev/null; then
        say "mmcv $MMCV with ops is here already."
        if sees_gpu && ! (OPS=cuda && mmcv_works 2>/dev/null); then
            say 'It has no ops that work on the GPU here: with FORCE_CUDA=1 one is made that has.'
        fi
        return
    elif sees_gpu; then
        OPS=cuda
    fi
    wheels=$(wheel_folder)
    if find_mmcv "$wheels"; then return; fi
    if [[ $OPS == cuda && $forced != 1 ]]; then
        if ! have_nvcc; then
            say 'A GPU is here but no nvcc (set CUDA_HOME): mmcv gets the CPU ops alone.'
        elif build_mmcv "$wheels"; then
            return
        else
            say 'mmcv could not be built for the GPU, so it gets the CPU ops alone.'
        fi
        OPS=cpu
        wheels=$(wheel_folder)
        if find_mmcv "$wheels"; then return; fi
    elif [[ $OPS == cuda ]]; then
        check_cuda
    fi
    build_mmcv "$wheels" || fail "the build of mmcv $MMCV failed; the end of its log is above." \
        "All of it: $wheels/build.log" \
        'Where the compiler was killed, memory ran out: run this again with MAX_JOBS=1.'
}

sees_gpu() {
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null
}

# An image that only runs CUDA programs has the folder, too, without the compiler.
have_nvcc() {
    "$PYTHON" -c 'import os, sys
from torch.utils.cpp_extension import CUDA_HOME
sys.exit(not (CUDA_HOME and os.access(os.path.join(CUDA_HOME, "bin", "nvcc"), os.X_OK)))' 2>/dev/null
}

# What a build for a GPU needs where it is asked for.
check_cuda() {
    have_nvcc || fail 'FORCE_CUDA=1 asks for CUDA ops of mmcv, and there is no nvcc to build them.' \
        'Set CUDA_HOME, or leave FORCE_CUDA out for the CPU ops alone.'
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.version.cuda)' ||
        fail 'FORCE_CUDA=1 asks for CUDA ops of mmcv, and the torch here is built for the CPU.' \
            'Install one that is built for CUDA, or leave FORCE_CUDA out.'
    if ! sees_gpu && [[ -z ${TORCH_CUDA_ARCH_LIST:-} ]]; then
        fail 'FORCE_CUDA=1 asks for CUDA ops of mmcv, and no GPU is seen to build them for.' \
            'Set TORCH_CUDA_ARCH_LIST, to 9.0 for an H100 or 8.0 for an A100, say.'
    fi
}

# A wheel fits one Python and one torch and has one kind of ops: those built here are kept apart.
wheel_folder() {
    local kind=
    if [[ $OPS == cuda ]]; then kind=-cuda; fi
    printf '%s%s\n' "$REPO/.whl/$("$PYTHON" -c '
import sys, torch
print("cp%d%d" % sys.version_info[:2], "torch", torch.__version__, sep="-")')" "$kind"
}

# Use the mmcv that is here, or find a wheel, those of the folder $1 first.
find_mmcv() {
    local wheels=$1 wheel
    if mmcv_works 2>/dev/null; then
        say "mmcv $MMCV with ops is here already."
        return
    fi
    mkdir -p "$wheels"
    for wheel in "$wheels/mmcv-$MMCV"-*.whl; do
        if [[ -f $wheel ]] && try_mmcv "$wheel"; then return; fi
    done
    # From the user's own --find-links, then from what pip has built before.
    if try_mmcv --only-binary mmcv "mmcv==$MMCV"; then return; fi
    while IFS= read -r wheel; do
        if [[ $wheel == */mmcv-$MMCV-*.whl ]] && try_mmcv "$wheel"; then return; fi
    done < <("$PYTHON" -m pip cache list mmcv --format=abspath 2>/dev/null || true)
    return 1
}

# Install one wheel of mmcv; fails, quietly, where there is none or its ops do not load.
try_mmcv() {
    "$PYTHON" -m pip install --disable-pip-version-check --quiet --no-deps --force-reinstall \
        "$@" >/dev/null 2>&1 || return 1
    if mmcv_works 2>/dev/null; then
        say "Installed a wheel of mmcv $MMCV; its ops work."
        return
    fi
    say "Found a wheel of mmcv $MMCV, but its ops do not work here:"
    mmcv_works 2>&1 | tail -n 1 || true
    "$PYTHON" -m pip uninstall --quiet --yes mmcv
    return 1
}

mmcv_works() {
    "$PYTHON" -c "
import mmcv, torch
import mmcv.ops
devices = ['cpu']
if '$OPS' == 'cuda':
    assert mmcv.ops.get_compiling_cuda_version() != 'not available', 'it has no CUDA ops'
    devices += ['cuda'] if torch.cuda.is_available() else []
for device in devices:
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8], [20, 20, 29, 29]], device=device)
    scores = torch.tensor([0.9, 0.8, 0.7], device=device)
    kept = mmcv.ops.nms(boxes, scores, 0.5)[1]
    assert mmcv.__version__ == '$MMCV' and kept.tolist() == [0, 2]"
}

# Build a wheel of mmcv with ops into the folder $1 and install it.
build_mmcv() {
    local wheels=$1 jobs=${MAX_JOBS:-$(nproc)} hide_gpu=()
    check_compiler
    say "No wheel of mmcv $MMCV with ops fits here, so it is built from PyPI's source distribution."
    say 'This takes about 15 minutes on two cores, once: the wheel is kept in'
    say "  $wheels"
    say "Compiling with $jobs jobs (set MAX_JOBS for another number); a line follows every 30 s."
    if [[ $OPS == cuda ]]; then
        say 'CUDA ops are built too, which takes longer.'
    else
        # mmcv asks torch for a GPU and then needs nvcc.
        hide_gpu=(CUDA_VISIBLE_DEVICES=)
        if ! sees_gpu && "$PYTHON" -c 'import sys, torch; sys.exit(not torch.version.cuda)'; then
            say 'torch is built for CUDA, but no GPU is seen here: the ops are for the CPU alone.'
            say 'FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 builds them for an H100, too.'
        fi
    fi
    # In the foreground, so that an interrupt reaches the compilers. With isolation mmcv would
    # not see torch and leave its ops out without a word.
    if ! env MMCV_WITH_OPS=1 MAX_JOBS="$jobs" ${hide_gpu[@]+"${hide_gpu[@]}"} "$PYTHON" -m pip \
        wheel --disable-pip-version-check -v --no-deps --no-build-isolation --no-cache-dir \
        --no-binary mmcv --wheel-dir "$wheels" "mmcv==$MMCV" 2>&1 |
        follow_build "$wheels/build.log"; then
        tail -n 25 "$wheels/build.log" >&2
        return 1
    fi
    try_mmcv "$wheels/mmcv-$MMCV"-*.whl
}

# Copy standard input to the log $1 and say how far the compiler is, every 30 seconds.
follow_build() {
    local log=$1 line status begin=$SECONDS next=30 done='preparing'
    : >"$log"
    while true; do
        status=0
        IFS= read -r -t 30 line || status=$?
        # Above 128: nothing came in time, and line holds what there is of one.
        if ((status == 0)); then
            printf '%s\n' "$line" >>"$log"
            if [[ $line =~ ^[[:space:]]*\[([0-9]+)/([0-9]+)\] ]]; then
                done="compiled ${BASH_REMATCH[1]} of ${BASH_REMATCH[2]} files"
            fi
        else
            printf '%s' "$line" >>"$log"
            if ((status <= 128)); then break; fi
        fi
        if ((SECONDS - begin >= next)); then
            say "  mmcv: $done, $(duration $((SECONDS - begin)))"
            next=$((SECONDS - begin + 30))
        fi
    done
    say "  mmcv: compiler ended after $(duration $((SECONDS - begin)))"
}

check_compiler() {
    local cxx=${CXX:-c++} headers version
    command -v "${cxx%% *}" >/dev/null || fail \
        "mmcv has to be compiled, and there is no C++ compiler ($cxx)." \
        'Debian: apt-get install g++. Elsewhere set CXX to the compiler. Then run this again,' \
        'or put a wheel of mmcv with ops where PIP_FIND_LINKS points.'
    headers=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if [[ ! -f $headers/Python.h ]]; then
        fail "mmcv has to be compiled, and the headers of Python $version are not in $headers." \
            "Debian: apt-get install python$version-dev. Then run this again."
    fi
    # shellcheck disable=SC2086  # CXX may hold a launcher and flags
    printf '#include <Python.h>\n#include <optional>\n' |
        $cxx -std=c++17 -x c++ -fsyntax-only -I"$headers" - ||
        fail "mmcv has to be compiled, and $cxx cannot compile C++17 with Python's headers:" \
            'the reason is above. Debian: apt-get install g++.'
}
