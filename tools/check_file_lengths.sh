#!/usr/bin/env bash
# Fails when a Python file is longer than a reader takes in at once.
set -euo pipefail
max_lines=400

too_long=$(find . -name .venv -prune -o -name '*.py' -type f -exec wc -l {} + |
    awk -v max="$max_lines" '$1 > max && $2 != "total" { print $2 ": " $1 " lines, at most " max }')
if [ -n "$too_long" ]; then
    echo "$too_long"
    exit 1
fi
