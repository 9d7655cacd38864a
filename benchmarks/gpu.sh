#!/usr/bin/env bash
# Everything that needs a GPU, the most valuable first, in one call of under ten minutes on a bare offline machine
# (Python 3.12, torch 2.11, triton 3.6, no network): tests, the proof, kernel groups, end to end, the rest of the suite, the report.
#
# usage: [WHEELS=FOLDER] [OUT=FOLDER] [PARTS="tests verify ..."] benchmarks/gpu.sh [--dry-run]
#   WHEELS   wheels of benchmarks/wheels.sh to install first (default: benchmarks/wheels, if it is there)
#   OUT      where results go (default: benchmarks/results); few files: gpu.log, gpu_parts.tsv, each part's JSON, the report
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
  timeout --signal=INT --kill-after=10 "$budget" "$@" 2>&1 | tee -a "$log"
  code=${PIPESTATUS[0]}
  case $code in
    0) code=passed ;;
    124 | 137) code="out of time" failed=1 ;;
    *) code="failed ($code)" failed=1 ;;
  esac
  printf '%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - started))" >> "$parts"
}
# suite NAME BUDGET_S OPTIONS...: a part of the benchmark suite. It begins no row after five sixths of the budget, and an
# interrupt at its end still lets pytest write what was measured.
suite() {
  local name=$1 budget=$2
  shift 2
  part "$name" "$budget" "$python" -m pytest -p no:cacheprovider -rs --budget_s "$((budget * 5 / 6))" "$@" \
    --benchmark-json="$out/suite_$name.json"
}

if [[ $dry == 1 ]]; then
  export CUDA_VISIBLE_DEVICES=
  part tests 200 "$python" -m pytest -m gpu -p no:cacheprovider -rs tests/test_verify.py tests/test_swiglu.py
  part verify 300 "$python" -m minimind_fast.verify --ops swiglu --dtype float32 --json "$out/verify.json"
  suite kernels 240 benchmarks/test_kernels.py -k "swiglu and not compile"
  suite end_to_end 240 benchmarks/test_steps.py
  suite layers 240 benchmarks/test_layers.py -k "attention and mix"
  suite rest 240 benchmarks/test_loading.py benchmarks/test_decoding.py
else
  part tests 140 "$python" -m pytest -m gpu -p no:cacheprovider --maxfail=30 --continue-on-collection-errors \
    --deselect tests/test_verify.py::test_every_kernel_in_every_dtype_on_the_gpu # the next part is that
  part verify 110 "$python" -m minimind_fast.verify --device cuda --json "$out/verify.json"
  suite kernels 125 benchmarks/test_kernels.py
  suite end_to_end 95 benchmarks/test_steps.py
  suite layers 45 benchmarks/test_layers.py
  suite rest 35 benchmarks/test_decoding.py benchmarks/test_loading.py
fi
shopt -s nullglob
runs=("$out"/suite_*.json)
[[ ${#runs[@]} == 0 ]] || part report 20 "$python" benchmarks/report.py "${runs[@]}" --out "$out"

say "$(column -t -s $'\t' "$parts" 2> /dev/null || cat "$parts")"
say "results in $out"
exit "$failed"
