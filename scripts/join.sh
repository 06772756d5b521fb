#!/bin/sh
# Join a run with a bare Debian or Ubuntu machine: installs psyche into a folder of its own, then joins. Run again, it
# just joins.
#
#   scripts/join.sh [--dry-run] [--install-deps] INVITE [options of psyche join]
#
#   --dry-run       say what would be done, and change nothing
#   --install-deps  as root: install what is missing with apt-get; without it the command is only named
#
# PSYCHE_HOME    where the installation goes (~/.psyche); removing that folder removes it
# PSYCHE_SOURCE  what is installed: a checkout, or anything pip takes (the checkout that this script lies in)
# PYTHON         the Python to use, 3.11 or newer
#
# pip looks where it always does: PIP_EXTRA_INDEX_URL names an index with the CPU build of torch, which is much smaller.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
home=${PSYCHE_HOME:-$HOME/.psyche}
source=${PSYCHE_SOURCE:-$here}
venv=$home/venv
stamp=$home/installed
dry=no
deps=no

say() { printf 'join.sh: %s\n' "$*"; }
die() {
    printf 'join.sh: %s\n' "$*" >&2
    exit 1
}
# Do a step, or only show it.
step() {
    if [ "$dry" = yes ]; then printf '  would run: %s\n' "$*"; else "$@"; fi
}

usage() {
    sed -n '2,/^set -eu/s/^# \{0,1\}//p' "$0"
    exit "$1"
}

while [ $# -gt 0 ]; do
    case $1 in
    --dry-run) dry=yes ;;
    --install-deps) deps=yes ;;
    -h | --help) usage 0 ;;
    *) break ;;
    esac
    shift
done
[ $# -gt 0 ] || usage 2
invite=$1
shift
case $invite in
psyche[0-9]* | @*) ;;
*) die "'$invite' is not an invite: invites start with psyche1; copy the whole string" ;;
esac

# ------------------------------------------------------------------------------------------ what is there

# Whether $1 is a Python that is new enough and can make environments.
usable() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if command -v "$candidate" >/dev/null && usable "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
}

# What apt has to install: the distribution's own Python where that is new enough, 3.11 beside it otherwise.
packages() {
    if command -v python3 >/dev/null && ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo python3.11 python3.11-venv
    else
        echo python3 python3-venv
    fi
}

# The GPU build where the driver works, and what several GPUs train one model with.
flavour=cpu
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    flavour=cuda
    if [ "$(nvidia-smi --list-gpus | grep -c '^GPU')" -gt 1 ]; then flavour=cuda,deepspeed; fi
fi

# What would be installed: another text than the stamp's means that it has to be, again.
wanted() {
    if [ -d "$source" ]; then
        sum=$(cd "$source" && find psyche kernels pyproject.toml constraints.txt -type f \
            \( -name '*.py' -o -name '*.toml' -o -name '*.txt' -o -path 'kernels/*' \) ! -path '*/__pycache__/*' \
            -exec cksum {} + | LC_ALL=C sort | cksum | cut -d ' ' -f 1)
        version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$source/pyproject.toml")
        echo "psyche $version ($sum from $source), $flavour"
    else
        echo "psyche ($source), $flavour"
    fi
}

# ---------------------------------------------------------------------------------------------- installing

# torch takes most of it: 1 GB for CPUs; several with CUDA's libraries.
check_room() {
    if [ "$flavour" = cpu ]; then need=3; else need=10; fi
    place=$home
    while [ ! -d "$place" ]; do place=$(dirname -- "$place"); done
    free=$(df -Pk "$place" | awk 'NR == 2 { print int($4 / 1048576) }')
    if [ "$free" -lt "$need" ]; then
        die "$free GB free at $place, $need GB needed: free some, or set PSYCHE_HOME to a larger disk"
    fi
}

ensure_python() {
    python=$(find_python)
    [ -z "$python" ] || return 0
    missing=$(packages)
    if [ "$deps" = yes ] && [ "$(id -u)" = 0 ]; then
        step apt-get update
        # shellcheck disable=SC2086 # several packages
        step apt-get install --yes --no-install-recommends $missing
        python=$(find_python)
        [ -n "$python" ] || [ "$dry" = yes ] || die "apt-get installed $missing, and still there is no Python 3.11 or newer"
        python=${python:-python3}
    elif [ "$dry" = yes ]; then
        say "Python 3.11 or newer with venv is missing; first run: sudo apt-get install $missing"
        python=python3
    else
        die "Python 3.11 or newer with venv is missing; run: sudo apt-get install $missing (or, as root, --install-deps)"
    fi
}

pip_install() { step "$venv/bin/python" -m pip --disable-pip-version-check install --quiet "$@"; }

install() {
    [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || die "psyche runs on Linux on x86-64, and this is $(uname -s) $(uname -m)"
    ensure_python
    check_room
    command -v c++ >/dev/null || say "no C++ compiler: codecs will be computed by PyTorch, more slowly (apt-get install g++)"
    say "installing into $home; torch is large, this takes minutes the first time"
    step mkdir -p "$home"
    step rm -f "$stamp"
    # One that was interrupted, or whose Python is gone, is made anew.
    if ! { [ -x "$venv/bin/python" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1; }; then
        step "$python" -m venv --clear "$venv"
    fi
    pins=
    if [ -f "$source/constraints.txt" ]; then pins="--constraint=$source/constraints.txt"; fi
    if [ "$flavour" != cpu ] && [ -d "$source" ]; then extra="[$flavour]"; fi
    pip_install ${pins:+"$pins"} "$source${extra:-}"
    if [ "$dry" = yes ]; then
        printf '  would write: %s (%s)\n' "$stamp" "$target"
    else
        printf '%s\n' "$target" >"$stamp"
    fi
}

target=$(wanted)
if [ -x "$venv/bin/psyche" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$target" ]; then
    say "installed: $target"
else
    install
fi

if [ "$dry" = yes ]; then
    step "$venv/bin/psyche" join "$invite" "$@"
    exit 0
fi
exec "$venv/bin/psyche" join "$invite" "$@"
