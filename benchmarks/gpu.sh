#!/usr/bin/env bash
# Everything that needs a GPU, the most valuable first, in one call of under ten minutes on a bare offline machine
# (Python 3.12, torch 2.11, triton 3.6, no network): tests, the proof, kernel times, end to end.
#
# usage: [WHEELS=FOLDER] [OUT=FOLDER] [PARTS="tests verify ..."] benchmarks/gpu.sh [--dry-run]
#   WHEELS   wheels of benchmarks/wheels.sh to install first (default: benchmarks/wheels, if it is there)
#   OUT      where results go (default: benchmarks/results); few files: gpu.log, gpu_parts.tsv, and each part's JSON
#   PARTS    which parts, by name (default: all)
#   --dry-run  all parts on this machine's CPU with small shapes: proves the button, measures nothing
#
# Each part has a budget in seconds and writes its results before the next begins, so that what was measured stays
# measured. A part that fails does not stop the others; the exit code is 1 if any failed.
set -uo pipefail
cd "$(dirname "$0")/.."

dry=0
for argument in "$@"; do
  case $argument in
    --dry-run) dry=1 ;;
    *) echo "usage: benchmarks/gpu.sh [--dry-run]" >&2; exit 2 ;;
  esac
done
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
mkdir -p "$out"
out=$(cd "$out" && pwd)
log=$out/gpu.log parts=$out/gpu_parts.tsv
: > "$log"
printf 'part\tresult\tseconds\n' > "$parts"
export PYTHONUNBUFFERED=1
say() { echo "$*" | tee -a "$log"; }

# Install, where this is not yet done: wheels into a folder of their own, then the package, editable.
wheels=${WHEELS:-benchmarks/wheels}
if compgen -G "$wheels/*.whl" > /dev/null && ! "$python" -c 'import deepspeed' 2> /dev/null; then
  site=$(mktemp -d)
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl \
    >> "$log" 2>&1 || say "installing $wheels failed; parts that need it will say so"
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
if ! "$python" -c 'import minimind_fast.kernels' 2> /dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-build-isolation -e . >> "$log" 2>&1 ||
    { say "cannot install the package; see $log"; exit 1; }
fi
"$python" - <<'P' 2>&1 | tee -a "$log"
import sys, torch
try:
    import triton
    version = triton.__version__
except ImportError:
    version = "none"
card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, triton {version}, {card}")
P
if [[ $dry == 0 ]] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  say "PyTorch sees no GPU here. benchmarks/gpu.sh --dry-run goes through the parts on a CPU."
  exit 1
fi

failed=0
# part NAME BUDGET_S COMMAND...: run one part within its budget and note how it went.
part() {
  local name=$1 budget=$2 code started=$SECONDS
  shift 2
  [[ " ${PARTS:-$name} " == *" $name "* ]] || return 0
  say "--- $name (at most $budget s): $*"
  timeout --kill-after=10 "$budget" "$@" 2>&1 | tee -a "$log"
  code=${PIPESTATUS[0]}
  case $code in
    0) code=passed ;;
    124 | 137) code="out of time" failed=1 ;;
    *) code="failed ($code)" failed=1 ;;
  esac
  printf '%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - started))" >> "$parts"
}
# part_if FILE NAME BUDGET_S COMMAND...: the same, for what is not there yet.
part_if() {
  local file=$1
  shift
  if compgen -G "$file" > /dev/null; then
    part "$@"
  elif [[ " ${PARTS:-$1} " == *" $1 "* ]]; then
    say "--- $1: left out, there is no $file"
    printf '%s\tleft out\t0\n' "$1" >> "$parts"
  fi
}

if [[ $dry == 1 ]]; then
  export CUDA_VISIBLE_DEVICES=
  part tests 120 "$python" -m pytest -m gpu -p no:cacheprovider -rs tests/test_verify.py tests/test_swiglu.py
  part verify 300 "$python" -m minimind_fast.verify --ops swiglu --dtype float32 --json "$out/verify.json"
  part kernel_times 120 "$python" benchmarks/kernel_times.py --presets minimind2-small --tokens 32 --out "$out"
  part_if "benchmarks/test_*.py" benchmarks 120 "$python" -m pytest benchmarks/ -p no:cacheprovider --benchmark-disable
  part_if benchmarks/end_to_end.py end_to_end 120 "$python" benchmarks/end_to_end.py --dry-run --out "$out"
else
  part tests 150 "$python" -m pytest -m gpu -p no:cacheprovider --maxfail=30 --continue-on-collection-errors \
    --deselect tests/test_verify.py::test_every_kernel_in_every_dtype_on_the_gpu # the next part is that
  part verify 130 "$python" -m minimind_fast.verify --device cuda --json "$out/verify.json"
  part kernel_times 140 "$python" benchmarks/kernel_times.py --out "$out" --budget_s 110
  part_if benchmarks/end_to_end.py end_to_end 120 "$python" benchmarks/end_to_end.py --out "$out"
  part_if "benchmarks/test_*.py" benchmarks 40 "$python" -m pytest benchmarks/ -p no:cacheprovider \
    --benchmark-json="$out/pytest_benchmark.json"
fi

say "$(column -t -s $'\t' "$parts" 2> /dev/null || cat "$parts")"
say "results in $out"
exit "$failed"
