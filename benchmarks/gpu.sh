#!/usr/bin/env bash
# What only a GPU can show, most valuable first, in calls that fit a card rented for 15 minutes in all (Python 3.12, torch
# 2.11, triton 3.6, no network). The first, at most 480 s: the proof by op, whole steps beside eager, compiled and Liger, kernels
# against their roofs, losses with kernels on and off. --second, at most 240 s: the tests, training beside the eager loop, ZeRO
# 0-3, generation. --third, at most 600 s, for who has more time: a real run to a chat, the engine's cost, the rest of the suite.
#
# usage: [WHEELS=FOLDER] [CORPUS=FOLDER] [OUT=FOLDER] [PARTS="verify steps ..."] benchmarks/gpu.sh [--second | --third]
#        [--archive FILE] [--dry-run]
#   WHEELS   wheels to install first (default: benchmarks/wheels), and
#   CORPUS   real text (default: benchmarks/corpus): both made by benchmarks/pack_for_gpu.py
#   OUT      where results go (default: benchmarks/results; in a dry run a temporary folder): gpu.log and gpu_parts.tsv
#            (gpu_second.log, ... of the second call), each part's files, the report
#   PARTS    parts to run, by name (default: all parts of the call)
#   --archive FILE  also pack all of OUT into this .tar.gz, rewritten after each part: for machines that return few files
#   --dry-run       all parts on this machine's CPU with small shapes: tests this script, measures nothing
#
# Each part is killed at the end of its budget in seconds and has written its results before the next begins, so nothing
# measured is lost. A part that fails does not stop the others; the exit code is 1 if any failed.
set -uo pipefail
cd "$(dirname "$0")/.."

dry=0 call=first name=gpu archive=
while (($#)); do
  case $1 in
    --dry-run) dry=1 ;;
    --second) call=second name=gpu_second ;;
    --third) call=third name=gpu_third ;;
    --archive) archive=${2:-}; [[ -n $archive ]] || { echo "--archive needs a FILE" >&2; exit 2; }; shift ;;
    *) echo "usage: benchmarks/gpu.sh [--second | --third] [--archive FILE] [--dry-run]" >&2; exit 2 ;;
  esac
  shift
done
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
[[ $dry == 0 || -n ${OUT:-} ]] || out=$(mktemp -d) # keep meaningless numbers out of the results
mkdir -p "$out"
out=$(cd "$out" && pwd)
log=$out/$name.log parts=$out/${name}_parts.tsv
: > "$log"
printf 'part\tresult\tseconds\n' > "$parts"
export PYTHONUNBUFFERED=1
say() { echo "$*" | tee -a "$log"; }

# The packed wheels are installed into their own folder. The package itself is found here, in the root.
wheels=${WHEELS:-benchmarks/wheels} corpus=${CORPUS:-benchmarks/corpus}
pack="python -m benchmarks.pack_for_gpu, where there is a network, makes benchmarks/wheels and benchmarks/corpus: carry both here"
if ! "$python" -c 'import deepspeed' 2> /dev/null; then
  if compgen -G "$wheels/*.whl" > /dev/null; then
    site=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl \
      >> "$log" 2>&1 || say "installing $wheels failed; parts that need it will say so"
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
  else
    say "DeepSpeed is not installed and $wheels holds no wheels. $pack."
    exit 1
  fi
fi
if [[ $call == third && $dry == 0 && ! -f $corpus/pretrain.jsonl ]]; then
  say "No real text in $corpus. $pack."
  exit 1
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

failed=0 aside=$(mktemp)
# part NAME BUDGET_S COMMAND...: run one part within its budget and record the outcome.
part() {
  local name=$1 budget=$2 code started=$SECONDS
  shift 2
  [[ " ${PARTS:-$name} " == *" $name "* ]] || return 0
  say "--- $name (at most $budget s): $*"
  timeout --signal=INT --kill-after=5 "$budget" "$@" 2>&1 | tee -a "$log"
  code=${PIPESTATUS[0]}
  case $code in
    0) code=passed ;;
    124 | 137) code="out of time" failed=1 ;;
    *) code="failed ($code)" failed=1 ;;
  esac
  printf '%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - started))" >> "$parts"
  [[ -z $archive ]] || { tar -czf "$aside" --exclude='*.tar.gz' -C "$out" . && cp "$aside" "$archive"; }
}
# suite NAME BUDGET_S OPTIONS...: a part of the benchmark suite. It starts no row after five sixths of the budget; the
# interrupt at its end still lets pytest write its results.
suite() {
  local name=$1 budget=$2
  shift 2
  part "$name" "$budget" "$python" -m pytest -p no:cacheprovider -rs --budget_s "$((budget * 5 / 6))" "$@" \
    --benchmark-json="$out/suite_$name.json"
}

if [[ $dry == 1 ]]; then
  export CUDA_VISIBLE_DEVICES=
fi
# Compiling kernels takes most of the tests' time, and a GPU machine has cores to spare. Each of these processes may use
# some 15 GB of the card: float64 truth at large vocabularies.
several=()
[[ $dry == 1 ]] || ! "$python" -c 'import xdist' 2> /dev/null || several=(-n 4 --dist worksteal)
text=() # default: the shipped sample
[[ ! -f $corpus/pretrain.jsonl ]] || text=(--data_path "$corpus/pretrain.jsonl" --tokenizer_path "$corpus/tokenizer")
if [[ $dry == 1 && $call == first ]]; then
  part verify 45 "$python" -m minimind_fast.commands.verify --ops swiglu --dtype float32 --models no --json "$out/verify.json"
  [[ ! -f $out/verify.json ]] || part verify_report 15 "$python" -m benchmarks.report verify "$out/verify.json"
  suite steps 40 benchmarks/suite/test_steps.py --presets tiny -k "model_step"
  suite kernels 35 benchmarks/suite/test_kernels.py -k "swiglu and not compile"
  part loss_curves 60 "$python" -m benchmarks.studies.loss_curves --dry_run --steps 2 --corpus "$corpus" --out "$out"
elif [[ $dry == 1 && $call == second ]]; then
  part tests 90 "$python" -m pytest -p no:cacheprovider -rs tests/proof/test_on_gpu.py -k "backends or cuda_graph"
  part train_step 60 "$python" -m benchmarks.studies.train_step --preset tiny --pack_tokens 2048 --rungs eager joined ours --out "$out"
  part zero 60 "$python" -m pytest -p no:cacheprovider -rs tests/training/test_gpu_training.py
  part generation 30 "$python" -m benchmarks.studies.generation --context 16 --new 8 --rounds 1 --rows 1 --out "$out/dry_generation.json"
elif [[ $dry == 1 ]]; then
  part real_run 400 "$python" -m benchmarks.studies.real_run --dry_run --corpus "$corpus" --out "$out"
  part engine_share 200 "$python" -m benchmarks.studies.engine_share --preset tiny --tokens 64 --world 1 --accumulation 1 --turns 1 --out "$out"
  suite layers 240 benchmarks/suite/test_layers.py -k "attention and mix"
  suite rest 240 benchmarks/suite/test_loading.py benchmarks/suite/test_decoding.py benchmarks/suite/test_weight_gradients.py
elif [[ $call == first ]]; then
  part verify 130 "$python" -m minimind_fast.commands.verify --device cuda --json "$out/verify.json"
  [[ ! -f $out/verify.json ]] || part verify_report 10 "$python" -m benchmarks.report verify "$out/verify.json"
  suite steps 115 benchmarks/suite/test_steps.py --presets minimind3,minimind3-moe -k model_step
  suite kernels 65 benchmarks/suite/test_kernels.py
  part loss_curves 80 "$python" -m benchmarks.studies.loss_curves --sample --steps 100 --corpus "$corpus" --out "$out"
elif [[ $call == second ]]; then
  part tests 80 "$python" -m pytest -m gpu "${several[@]}" -p no:cacheprovider --maxfail=30 --continue-on-collection-errors \
    --ignore tests/training/test_gpu_training.py --deselect tests/proof/test_verify.py::test_every_kernel_in_every_dtype_on_the_gpu # parts of their own
  part train_step 45 "$python" -m benchmarks.studies.train_step "${text[@]}" --rungs eager joined ours --warm 10 --steps 30 --out "$out"
  part zero 45 "$python" -m pytest -m gpu -p no:cacheprovider -rs tests/training/test_gpu_training.py
  part generation 25 "$python" -m benchmarks.studies.generation --rows 1 8 64 --new 128 --out "$out/gpu_generation.json"
else
  part real_run 210 "$python" -m benchmarks.studies.real_run --minutes 2 --corpus "$corpus" --out "$out"
  part engine_share 110 "$python" -m benchmarks.studies.engine_share --accumulation 1 --out "$out"
  suite layers 110 benchmarks/suite/test_layers.py
  suite rest 70 benchmarks/suite/test_decoding.py benchmarks/suite/test_weight_gradients.py benchmarks/suite/test_loading.py
fi
shopt -s nullglob
runs=("$out"/suite_*.json)
[[ $call == second || ${#runs[@]} == 0 ]] || part report 15 "$python" -m benchmarks.report suite "${runs[@]}" --out "$out"

say "$(column -t -s $'\t' "$parts" 2> /dev/null || cat "$parts")"
say "results in $out"
exit "$failed"
