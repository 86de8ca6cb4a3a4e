#!/usr/bin/env bash
# ./bench_gpu.sh OUT [PART...]   all that only a GPU can show, unattended, on a machine with one NVIDIA GPU
#
#     while ./bench_gpu.sh runs/gpu; [ $? = 3 ]; do :; done       until everything is done
#
# The parts, in their order where none is named; each logs to OUT/PART.log:
#     tests                                          the tests of kernels, graphs and --deterministic, on the GPU
#     train infer surface surface-large              bench.py, each to OUT/PART.json as well
#     dice-float32-2 dice-float32-14 dice-bfloat16-2 dice-bfloat16-14 norm-float32 norm-bfloat16
#     conv-bfloat16
#     reciprocal-SEED supervised-SEED off-SEED       for each of SEEDS the left atrium at 20% labeled with the recipe's
#                                                    settings: reciprocal learning, supervised, and the first with
#                                                    --feedback off; runs of reciprocal.py in OUT/PART
# A call starts no part in the last MARGIN of LIMIT seconds, stops what runs after LIMIT, packs and ends. The next one
# skips the parts that are done (OUT/PART.done), goes on with a training from its checkpoint, and begins again what else
# was cut off. What failed, or was cut off twice, is not tried again (OUT/PART.failed) unless it is named.
# Exit status: 0 all is done, 3 call again, 1 a part failed (the others were done), 2 no such part or no such device.
#
# Every call leaves in OUT/keep what is worth carrying away, in files of 15 MiB at most:
#     results.tar.gz.*     OUT without weights: logs, JSON, metrics, pictures, predictions (uint8 NIfTI)
#     PART.pt.*            a student whose convolutions are rounded to float16; use it as any other checkpoint:
#                          cat PART.pt.* >PART.pt; python reciprocal.py predict --checkpoint PART.pt -i scans/ -o masks/
#
# Variables: LA, the folder of the left-atrium data (default data/la); SEEDS ("1337 1338 1339"); LIMIT (500), MARGIN
# (120); PYTHON (.venv/bin/python, else python3); DEVICE (cuda); TRAIN_ARGS, arguments of reciprocal.py instead of the
# left atrium's. On an H100 tests and benches take some minutes and, by its measured steps, the three trainings of a seed
# 10 minutes; with a quarter of their schedule 4, reading and scoring included:
#     SEEDS=1337 TRAIN_ARGS="--data la --root $LA --labeled 0.2 --iterations 1500 --pretrain 1500 --lr-step 625" \
#         ./bench_gpu.sh OUT
# For a rehearsal without GPU or data, BENCH_ARGS are more arguments for bench.py:
#     DEVICE=cpu SEEDS=1 BENCH_ARGS="--patch 32 32 32 --filters 4 --depth 2 --rounds 1" TRAIN_ARGS="--data phantom" \
#         ./bench_gpu.sh OUT
#
# Needs Python 3.11 with torch, triton, numpy, scipy, nibabel, h5py, matplotlib, tqdm and pytest; ./train.sh installs
# them. Without a network copy the wheel of what is missing: python3 -m pip install --no-index --no-deps nibabel-*.whl
# Where MONAI, MedPy or CuPy are installed, bench.py measures them too.
set -uo pipefail
[ $# -gt 0 ] || { echo "error: give a folder for the results: ./bench_gpu.sh OUT [PART...]" >&2; exit 2; }
out=$(realpath -m "$1")
shift
LA=$(realpath -m "${LA:-data/la}")
cd "$(dirname "$0")" || exit
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
limit=${LIMIT:-500} margin=${MARGIN:-120} device=${DEVICE:-cuda}
[ "$limit" -gt "$margin" ] || { echo "error: LIMIT $limit: more than MARGIN $margin, or no part would begin" >&2; exit 2; }
read -ra bench_args <<<"${BENCH_ARGS:-}"
train_args=(--data la --root "$LA" --labeled 0.2)
[ -z "${TRAIN_ARGS:-}" ] || read -ra train_args <<<"$TRAIN_ARGS"
mkdir -p "$out/keep" || exit

pack() {
    rm -f "$out"/keep/results.tar.gz.*
    tar -C "$out" --exclude=keep --exclude='*.pt' -cz . | split -b 15m - "$out/keep/results.tar.gz."
    for student in "$out"/*/student.pt; do
        part=$(basename "$(dirname "$student")")
        if [ -e "$out/$part.done" ] && [ ! -e "$out/keep/$part.pt.aa" ]; then
            "$python" - "$student" "$out/$part.pt" <<'PYTHON'
import sys
from pathlib import Path

import record

source, target = map(Path, sys.argv[1:])
saved = record.load_checkpoint(source)
student = {name: x.half() if x.ndim > 1 else x for name, x in saved["nets"]["student"].items()}
record.save_checkpoint(target, saved | dict(nets=dict(student=student)))
PYTHON
            split -b 15m "$out/$part.pt" "$out/keep/$part.pt."
            rm "$out/$part.pt"
        fi
    done
}

# do_part PART COMMAND...
do_part() {
    local left=$((limit - SECONDS)) start=$SECONDS status
    if [ $left -lt "$margin" ]; then
        echo "$1: not begun, $left s are left"
        exit 3
    fi
    # in the foreground it signals the command once: a second signal would not wait for the checkpoint
    timeout --foreground -k 10 "$left" "${@:2}" >>"$out/$1.log" 2>&1 &
    child=$!
    wait $child
    status=$?
    echo "$1: status $status after $((SECONDS - start)) s"
    tail -n 12 "$out/$1.log"
    case $status in
        0)
            touch "$out/$1.done"
            rm -f "$out/$1.failed"
            return
            ;;
        124 | 137)
            if [ -e "$out/$1/config.json" ] || [ ! -e "$out/$1.cut" ]; then
                touch "$out/$1.cut"
                exit 3
            fi
            ;;
    esac
    touch "$out/$1.failed"
    failed+=("$1")
}

bench() {
    do_part "$1" "$python" bench.py "${@:2}" --device "$device" --json "$out/$1.json" "${bench_args[@]}"
}

learn() {
    if [ -e "$out/$1/config.json" ]; then
        do_part "$1" "$python" reciprocal.py --resume "$out/$1"
    else
        rm -rf "${out:?}/$1"
        # checkpoints and points of the curve minutes apart, as an iteration takes some hundredths of a second
        do_part "$1" "$python" reciprocal.py --log-every 50 --eval-every 2000 --save-every 2000 "${train_args[@]}" \
            "${@:2}" --seed "${1##*-}" --device "$device" --out "$out/$1"
    fi
}

parts=("$@")
if [ $# = 0 ]; then
    parts=(tests train infer dice-float32-2 dice-float32-14 dice-bfloat16-2 dice-bfloat16-14
        norm-float32 norm-bfloat16 conv-bfloat16 surface surface-large)
    for seed in ${SEEDS:-1337 1338 1339}; do
        parts+=("reciprocal-$seed" "supervised-$seed" "off-$seed")
    done
fi
named=$# failed=()
child=
trap pack EXIT
trap 'kill $child; wait $child; exit 3' INT TERM
for part in "${parts[@]}"; do
    [ ! -e "$out/$part.done" ] || continue
    if [ "$named" = 0 ] && [ -e "$out/$part.failed" ]; then
        failed+=("$part")
        continue
    fi
    IFS=- read -r _ dtype classes <<<"$part"
    case $part in
        tests)
            "$python" -c 'import sys, torch; torch.empty(1, device=sys.argv[1])' "$device" 2>/dev/null ||
                { echo "error: no device $device here" >&2; exit 2; }
            workers=()  # compiling for each test takes most of the time
            "$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)
            do_part tests "$python" -m pytest "${workers[@]}" tests/test_{dice,surface,norm,conv}.py \
                tests/test_metrics.py::test_gpu_agrees tests/test_reciprocal.py::test_a_graph_computes_what_the_step_does \
                tests/test_faults.py::test_{deterministic,resumed_equals_straight}_on_a_gpu
            ;;
        dice-*-*) bench "$part" dice --dtype "$dtype" --classes "$classes" ;;
        norm-* | conv-*) bench "$part" "${part%-*}" --dtype "$dtype" ;;
        surface | infer) bench "$part" "$part" ;;
        surface-large) bench "$part" surface --patch 512 512 200 --rounds 3 ;;
        train) bench "$part" train --compile ;;
        supervised-*) learn "$part" --method supervised ;;
        reciprocal-*) learn "$part" ;;
        off-*) learn "$part" --feedback off ;;
        *) echo "error: no part $part; the header of this file lists them" >&2; exit 2 ;;
    esac
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
echo "all parts are done; results in $out/keep"
