#!/bin/sh
# Makes a checkout ready: Debian packages from packages.txt, then .venv with the development extras.
# Safe to run again: packages that are there are left alone, the environment is brought up to date.
set -eu
cd "$(dirname "$0")/.."

missing=
while read -r package _; do
    case $package in '' | '#'*) continue ;; esac
    state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$state" = installed ] || missing="$missing $package"
done <packages.txt

if [ -n "$missing" ]; then
    if [ "$(id -u)" -ne 0 ]; then
        echo "setup: these Debian packages are missing:$missing" >&2
        echo "hint: as root, run: apt-get update && apt-get install --no-install-recommends$missing" >&2
        exit 1
    fi
    echo "setup: installing$missing"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q
    # The list is words on purpose.
    # shellcheck disable=SC2086
    apt-get install -q -y --no-install-recommends $missing
fi

# The distribution's interpreter, not whatever comes first in PATH: python3-libnbd belongs to it.
[ -x .venv/bin/python ] || /usr/bin/python3 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
echo "setup: ready; .venv/bin/dmctl and .venv/bin/bitmapd are installed"
