#!/usr/bin/env bash
# Everything that a GPU is needed for, in under nine minutes, the most important first: ceilings, tests, kernels,
# whole decode steps, prefill, training. Every part has a time limit and a file of its own, and what is there is merged
# after each, so that a part that dies or hangs loses nothing. Needs torch, triton, transformers, numpy and pytest;
# learnkv is not installed.
#
#   RESULTS=DIR     where <gpu>-<sha>.json goes (benchmarks/results)
#   PARTS=DIR       where parts and logs go (a new folder)
#   SHA=abc1234     the commit, in a copy without history
#   PYTHON=python3  interpreter
#   DEADLINE=530    seconds for everything
#   PART_LIMIT=N    seconds for a part at most, where its own limit is longer
#   DRY_RUN=1       tiny shapes on the CPU, to try it out; RESULTS is then PARTS unless it is given
#   KVPRESS_PYTHON  interpreter of an environment with kvpress, measured too where it is given
set -uo pipefail
cd "$(dirname "$0")/.."

DRY_RUN=${DRY_RUN:-}
PYTHON=${PYTHON:-python3}
DEADLINE=${DEADLINE:-530}
PART_LIMIT=${PART_LIMIT:-$DEADLINE}
PARTS=${PARTS:-$(mktemp -d)}
RESULTS=${RESULTS:-${DRY_RUN:+$PARTS/merged}}
RESULTS=${RESULTS:-benchmarks/results}
mkdir -p "$PARTS"
rm -f "$PARTS"/*.json "$PARTS"/*.xml "$PARTS/status"
export PYTHONPATH="src:.${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TRANSFORMERS_VERBOSITY=error
export SHA=${SHA:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
dry=()
if [ -n "$DRY_RUN" ]; then
    export TRITON_INTERPRET=1
    dry=(--dry-run)
fi

# part NAME LIMIT COMMAND...: at most LIMIT seconds, or what is left; it is told to begin nothing new ten before.
part() {
    local name=$1 limit=$2 left=$((DEADLINE - SECONDS)) begin=$SECONDS
    if ((limit > PART_LIMIT)); then limit=$PART_LIMIT; fi
    shift 2
    if ((left < 5)); then
        echo "== $name: no time left"
        return
    fi
    if ((limit > left)); then limit=$left; fi
    echo "== $name: at most $limit s, $SECONDS s after the start"
    timeout -k 5 "$limit" "$@" >"$PARTS/$name.log" 2>&1
    local status=$?
    tail -n 3 "$PARTS/$name.log" | cut -c 1-300
    echo "== $name: status $status after $((SECONDS - begin)) s"
    echo "$name $status $((SECONDS - begin))" >>"$PARTS/status"
    if compgen -G "$PARTS/*.json" >/dev/null; then
        timeout -k 5 60 "$PYTHON" -m benchmarks.merge "$PARTS" --into "$RESULTS" >"$PARTS/summary.log" 2>&1 ||
            tail -n 3 "$PARTS/summary.log"
    fi
}

# script NAME LIMIT [OPTION...]: `python -m benchmarks.NAME`
script() {
    local name=$1 limit=$2 left=$((DEADLINE - SECONDS))
    if ((limit > PART_LIMIT)); then limit=$PART_LIMIT; fi
    shift 2
    if ((limit > left)); then limit=$left; fi
    local file=$name
    for word in "$@"; do file=$file-${word#--}; done
    part "$file" "$limit" "$PYTHON" -m "benchmarks.$name" --out "$PARTS/$file.json" --seconds $((limit - 10)) \
        ${dry[@]+"${dry[@]}"} "$@"
}

spread=()
if "$PYTHON" -c 'import xdist' 2>/dev/null && [ -z "$DRY_RUN" ]; then spread=(-n 8); fi # compilation is what takes time

# tests NAME LIMIT FILE...
tests() {
    local name=$1 limit=$2
    shift 2
    part "tests-$name" "$limit" "$PYTHON" -m pytest -q -rf ${spread[@]+"${spread[@]}"} -p no:cacheprovider \
        --continue-on-collection-errors --junitxml="$PARTS/tests-$name.xml" "$@"
}

script ceilings 60
tests gpu 70 tests/gpu
if [ -z "$DRY_RUN" ]; then # on the CPU they run wherever tests run: those that take the device from support/kernels.py
    tests kernels 70 $(grep -l "^from support.kernels import" tests/ops/test_*.py)
fi
script kernels 75 --only decode
script kernels 40 --only bits
script decode 130
script kernels 40 --only eviction
script kernels 25 --only pages
script prefill 60
script train_step 50
if [ -n "${KVPRESS_PYTHON:-}" ]; then
    part kvpress 60 "$KVPRESS_PYTHON" -m benchmarks.peers.kvpress_adakv --out "$PARTS/kvpress.json" ${dry[@]+"${dry[@]}"}
fi
script kernels 50 --only training
script step_memory 60
script decode 120 --static

echo "== $SECONDS s in all"
cat "$PARTS/summary.log"
