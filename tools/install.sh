#!/usr/bin/env bash
# Makes .venv and installs fathom into it, editable, with the versions of constraints.txt; then pillow-simd over Pillow
# where it can be built. Run again, it does only what is missing.
#
#   tools/install.sh [run|dev] [CUDA]      dev adds what tests and checks need; CUDA is 13 (default) or 12
set -euo pipefail
cd "$(dirname "$0")/.."

KIND=${1:-run}
CUDA=${2:-13}
VENV=.venv
PIP_FLAGS=(--disable-pip-version-check)
[ -t 1 ] || PIP_FLAGS+=(-q)

die() { echo "error: $*" >&2; exit 2; }

fits() { # a Python that setup.py accepts; a shim that fails to start does not
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.11 python3.12}; do
        if command -v "$candidate" >/dev/null && fits "$candidate"; then echo "$candidate"; return; fi
    done
    die "no Python 3.11 or 3.12 found (looked for: ${PYTHON:-python3 python3.11 python3.12}; python3 is" \
        "$(python3 --version 2>&1 || true)). Install one, then: make install PYTHON=/path/to/python3.11"
}

make_venv() {
    if fits "$VENV/bin/python"; then return; fi
    local python; python=$(find_python)
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        die "$python cannot make virtual environments: its venv module is missing (Debian: apt-get install python3-venv)"
    local free; free=$(df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}')
    [ "$free" -ge 10 ] || die "$free GiB free in $PWD; the environment needs 10 GiB (torch with its CUDA libraries)"
    echo "making $VENV with $("$python" --version)"
    "$python" -m venv --clear "$VENV"
}

install_packages() {
    local want stamp="$VENV/.fathom-$KIND"
    want="kind=$KIND cuda=$CUDA files=$(cat setup.py constraints.txt | cksum) at=$PWD"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then return; fi
    # What dev installs contains what run installs.
    if [ "$KIND" = run ] && [ -f "$VENV/.fathom-dev" ] &&
        [ "$(cat "$VENV/.fathom-dev")" = "${want/kind=run/kind=dev}" ]; then return; fi
    local extras="cuda$CUDA"
    [ "$KIND" = dev ] && extras="$extras,dev"
    echo "installing fathom and what it needs into $VENV (minutes; about 6 GB with the CUDA libraries)"
    rm -f "$VENV"/.fathom-*
    FATHOM_CUDA="$CUDA" "$VENV/bin/python" -m pip install "${PIP_FLAGS[@]}" -c constraints.txt -e ".[$extras]"
    "$VENV/bin/python" -m pip check
    echo "$want" >"$stamp"
}

pillow_works() { # whole: it starts, and reads the two formats of every dataset
    "$VENV/bin/python" -c 'import sys
from PIL import Image, features
sys.exit(not (features.check("jpg") and features.check("zlib")))' 2>/dev/null
}

restore_pillow() {
    "$VENV/bin/python" -m pip uninstall -q -y pillow-simd >/dev/null 2>&1 || true
    "$VENV/bin/python" -m pip install "${PIP_FLAGS[@]}" --no-deps --force-reinstall -c constraints.txt pillow
}

install_pillow_simd() {
    local version reason
    version=$("$VENV/bin/python" -c 'import PIL; print(PIL.__version__)' 2>/dev/null) || version=broken
    case $version in *post*) pillow_works && return ;; esac
    local simd; simd=$(sed -n 's/^pillow-simd==//p' constraints.txt)
    if ! reason=$("$VENV/bin/python" -m launcher.simd); then
        echo "staying on Pillow, which is slower at resizing: pillow-simd cannot be built here: $reason"
        pillow_works || restore_pillow
        return
    fi
    echo "building pillow-simd $simd over Pillow (half a minute)"
    # Pillow of the same version stays registered, so that other packages' requirements on it hold. No cache: a wheel
    # built for this processor must not turn up on another, nor one built without AVX2 here.
    local log="$VENV/pillow-simd.log"
    if CC="${CC:-cc} -mavx2" "$VENV/bin/python" -m pip install --disable-pip-version-check --no-cache-dir --no-deps \
        --force-reinstall --no-binary pillow-simd "pillow-simd==$simd" >"$log" 2>&1 && pillow_works; then
        "$VENV/bin/python" -m pip check
        return
    fi
    echo "warning: pillow-simd did not build (see $log); going back to Pillow" >&2
    restore_pillow
}

case $KIND in run | dev) ;; *) die "kind '$KIND': run or dev" ;; esac
case $CUDA in 12 | 13) ;; *) die "CUDA '$CUDA': 12 or 13" ;; esac
make_venv
install_packages
install_pillow_simd
