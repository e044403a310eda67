#!/usr/bin/env bash
# Runs a command with the environment of CANN and NNAL, wherever the base image has them.
set -euo pipefail

scripts=(/usr/local/Ascend/{ascend-toolkit,cann,nnal/atb}/set_env.sh)
if [ -n "${CANN_SET_ENV:-}" ]; then
    scripts+=("$CANN_SET_ENV")
fi
found=
# Their scripts read variables that may not be set.
set +u
for script in "${scripts[@]}"; do
    if [ -r "$script" ]; then
        # shellcheck source=/dev/null
        source "$script"
        found=1
    fi
done
set -u
if [ -z "$found" ]; then
    echo "no set_env.sh of CANN under /usr/local/Ascend; name it in CANN_SET_ENV" >&2
    exit 1
fi
exec "$@"
