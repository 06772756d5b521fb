#!/bin/sh
# Install psyche into a folder of its own on Debian or Ubuntu, then join a run. Run the same command to rejoin; nothing is
# installed again unless the source has changed.
#
#   scripts/join.sh [--dry-run] [--install-deps] INVITE [options of psyche join]
#
#   --dry-run       print what would be done, and change nothing
#   --install-deps  as root: install missing packages with apt-get; otherwise the command is only printed
#
# PSYCHE_HOME    folder of the installation (default ~/.psyche); delete it to uninstall
# PSYCHE_SOURCE  what to install: a checkout, or anything that pip takes (default: the checkout of this script)
# PYTHON         the Python to use, 3.11 or newer
#
# pip uses its usual settings: PIP_EXTRA_INDEX_URL can name an index with the CPU build of torch, which is much smaller.
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
# Run a command, or only print it.
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
*) die "'$invite' is not an invite: an invite starts with psyche1; copy all of it" ;;
esac

# ------------------------------------------------------------------------------------------ detection

# Whether $1 is Python 3.11 or newer that can create virtual environments.
usable() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if command -v "$candidate" >/dev/null && usable "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
}

# Packages for apt: the distribution's Python if it is new enough, else 3.11 beside it.
packages() {
    if command -v python3 >/dev/null && ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo python3.11 python3.11-venv
    else
        echo python3 python3-venv
    fi
}

# Extras: cuda if the NVIDIA driver works, deepspeed if there are several GPUs.
flavour=cpu
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    flavour=cuda
    if [ "$(nvidia-smi --list-gpus | grep -c '^GPU')" -gt 1 ]; then flavour=cuda,deepspeed; fi
fi

# Identifies what would be installed. If it differs from the stamp, psyche is installed again.
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

# ---------------------------------------------------------------------------------------------- installation

# GB of disk; torch takes most of it.
check_room() {
    if [ "$flavour" = cpu ]; then need=3; else need=10; fi
    place=$home
    while [ ! -d "$place" ]; do place=$(dirname -- "$place"); done
    free=$(df -Pk "$place" | awk 'NR == 2 { print int($4 / 1048576) }')
    if [ "$free" -lt "$need" ]; then
        die "$free GB free at $place, $need GB needed: free some space, or set PSYCHE_HOME to another disk"
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
        [ -n "$python" ] || [ "$dry" = yes ] || die "apt-get installed $missing, but there is still no Python 3.11 or newer: set PYTHON"
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
    [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || die "psyche needs Linux on x86-64; this is $(uname -s) $(uname -m)"
    ensure_python
    check_room
    command -v c++ >/dev/null || say "no C++ compiler: codecs will use PyTorch, which is slower (apt-get install g++)"
    say "installing into $home; the first time takes minutes, because torch is large"
    step mkdir -p "$home"
    step rm -f "$stamp"
    # Recreate an environment that is incomplete or whose Python is gone.
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
