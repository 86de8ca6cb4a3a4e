#!/usr/bin/env bash
# ./train.sh [arguments]   installs into .venv once, then runs `python reciprocal.py [arguments]`;
#                          without arguments it trains on the embedded, synthetic data set `phantom`
# ./train.sh test [...]    the same set-up, then ruff and pytest
set -euo pipefail
cd "$(dirname "$0")"

if [ ! -e .venv/installed ] || [ pyproject.toml -nt .venv/installed ] || [ constraints.txt -nt .venv/installed ]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "error: Python 3.11 or newer is needed, python3 is $(python3 --version)" >&2; exit 2; }
    python3 -m venv .venv
    # Only the dependencies are installed: the modules run from this folder.
    python3 - <<'PYTHON' >.venv/requirements.txt
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(*project["dependencies"], *project["optional-dependencies"]["test"], sep="\n")
PYTHON
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        -r .venv/requirements.txt -c constraints.txt
    touch .venv/installed
fi

if [ "${1:-}" = test ]; then
    .venv/bin/python -m ruff check .
    exec .venv/bin/python -m pytest "${@:2}"
fi
exec .venv/bin/python reciprocal.py "${@:---data=phantom}"
