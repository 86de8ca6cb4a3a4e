#!/usr/bin/env bash
# ./train.sh [arguments]   installs into .venv once, then runs `python reciprocal.py [arguments]`;
#                          without arguments it trains on the embedded, synthetic data set `phantom`
# ./train.sh test [...]    the same set-up, then ruff and pytest
# ./train.sh compare OUT [arguments]   the paper's table, and more, for a data set: every method over the seeds of
#                          SEEDS="1 2 3", a run each in OUT, done once and resumed where it stopped, with the arguments
#                          it began with; then metrics.py compare of all
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
if [ "${1:-}" = compare ]; then
    [ $# -gt 1 ] || { echo "error: give a folder for the runs: ./train.sh compare OUT [arguments]" >&2; exit 2; }
    out=$2
    # The paper's student is not pre-trained: it takes these iterations as reciprocal ones, and longer steps of the
    # learning rate, which its teacher's pre-training has, too.
    longer=$(.venv/bin/python - "${@:3}" <<'PYTHON'
import sys

import reciprocal
from baselines import COMPARISONS
from cli import BadInput, cli

def longer():
    flags = vars(reciprocal.train_parser().parse_args(sys.argv[1:]))
    for name in ("method", "preset", "lesson", "cutmix", "feedback", "student_start", "teacher_from", "student_from",
                 "budget", "seed", "out", "resume"):
        if flags.get(name) is not None:
            name = name.replace("_", "-")
            raise BadInput(f"--{name} is for this script to set: it makes all the runs of a table, seeds SEEDS='1 2 3'")
    flags.pop("resume")
    for row in (dict(cutmix=True), *(dict(method=method) for method in COMPARISONS)):
        reciprocal.configure(flags | row)  # what a row of the table refuses is said before the first run
    cfg = reciprocal.configure(flags)
    more = cfg.iterations + cfg.pretrain
    print(f"--iterations {more} --lr-step {max(1, cfg.lr_step * more // max(1, cfg.iterations))}")

sys.exit(cli(longer))
PYTHON
    )
    [[ $longer = --iterations* ]] || { echo "$longer"; exit; }  # the help
    for seed in ${SEEDS:-1 2 3}; do
        while read -r name flags; do
            run=$out/$name-seed$seed
            if [ -e "$run/summary.json" ]; then
                continue
            elif [ -e "$run/config.json" ]; then
                .venv/bin/python reciprocal.py --resume "$run" </dev/null
            else
                # shellcheck disable=SC2086  # flags are words
                .venv/bin/python reciprocal.py "${@:3}" $flags --seed "$seed" --out "$run" </dev/null
            fi
        done <<RUNS
reciprocal
reciprocal-mixed --lesson mixed
reciprocal-mixed-cutmix --lesson mixed --cutmix
reciprocal-off --feedback off
reciprocal-shuffled --feedback shuffled
reciprocal-paper --preset paper $longer
reciprocal-paper-off --preset paper --feedback off $longer
supervised --method supervised
supervised-cutmix --method supervised --cutmix
supervised-cutmix-patches --method supervised --cutmix --budget patches
supervised-patches --method supervised --budget patches
mt --method mt
uamt --method uamt
sassnet --method sassnet
tcsm --method tcsm
bcp --method bcp
RUNS
    done
    exec .venv/bin/python metrics.py compare "$out"/*/ \
        --csv "$out/compare.csv" --markdown "$out/compare.md" --plot "$out/compare.png"
fi
exec .venv/bin/python reciprocal.py "${@:---data=phantom}"
