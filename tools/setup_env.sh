#!/usr/bin/env bash
# Makes .venv from requirements/cpu-lock.txt and installs this package in it as editable.
#
# Nothing happens while .venv/.complete, written last, names the present lock, place and package
# metadata. So an interrupted set-up never counts as done, a changed lock or a moved checkout is
# noticed, and running it twice costs nothing.
#
# Environment: PYTHON              the Python 3.11 to build from (default: looked up on PATH)
#              R2VPO_EXTRA_INDEX_URL  a further package index, for PyTorch's CPU wheels
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

lock=requirements/cpu-lock.txt
stamp=.venv/.complete
free_gib_needed=4

fail() {
    echo "set-up: $1" >&2
    [ $# -lt 2 ] || echo "        $2" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 found on PATH." "Install it, or name one: make setup PYTHON=/path/to/python3.11"
}

check_machine() {
    [ "$(uname -sm)" = "Linux x86_64" ] ||
        fail "the CPU lock is for Linux on x86_64; this is $(uname -sm)." "See requirements/README.md."
    "$1" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$1 lacks the module venv or ensurepip." "On Debian and Ubuntu: apt-get install python3.11-venv"
    local free_gib
    free_gib=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1048576))
    [ "$free_gib" -ge "$free_gib_needed" ] ||
        fail "$free_gib GiB free on this disk; the environment needs $free_gib_needed GiB."
}

make_environment() {
    local python
    python=$(find_python)
    check_machine "$python"
    echo "set-up: making .venv with $(grep -c '==' "$lock") pinned packages (about 2 minutes, 3.2 GB)"
    rm -rf .venv
    "$python" -m venv .venv
    .venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps \
        ${R2VPO_EXTRA_INDEX_URL:+--extra-index-url "$R2VPO_EXTRA_INDEX_URL"} -r "$lock" ||
        fail "installing $lock failed, see above." \
            "If torch's +cpu build was not found, set R2VPO_EXTRA_INDEX_URL to PyTorch's index of CPU wheels."
}

trap 'echo "set-up: interrupted; run it again to start afresh" >&2; exit 130' INT TERM

# One set-up at a time: two `make`s may run side by side.
if command -v flock >/dev/null; then
    exec 9<"$lock"
    flock 9
fi

environment_key=$( (cat "$lock" && pwd) | sha256sum | cut -d ' ' -f 1)
package_key=$(cat setup.cfg pyproject.toml | sha256sum | cut -d ' ' -f 1)
{ read -r old_environment_key && read -r old_package_key; } 2>/dev/null <"$stamp" || true
[ "${old_environment_key:-}:${old_package_key:-}" != "$environment_key:$package_key" ] || exit 0

if [ "${old_environment_key:-}" != "$environment_key" ]; then
    make_environment
fi
rm -f "$stamp"
.venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps \
    --no-build-isolation -e . || fail "installing this package into .venv failed, see above."
printf '%s\n%s\n' "$environment_key" "$package_key" >"$stamp"
echo "set-up: .venv is ready"
