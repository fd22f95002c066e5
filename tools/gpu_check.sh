#!/usr/bin/env bash
# Runs everything of csrc/ that needs a GPU, in parts of less than 8 minutes, and says what passed.
#
#   tools/gpu_check.sh [--output DIRECTORY] [--only PART...] [--again] [--emulated] [--list]
#
# Each part leaves a log and a JSON file in the directory (default gpu_check/). What passed is not run again, so the
# script goes on where it was ended; --again runs it all the same. A library of csrc/ that was brought is used where there
# is no nvcc. --emulated tries the script without a GPU, on the emulated kernels at toy sizes, all parts with the longest
# limit: its times mean nothing. PYTHON chooses the interpreter. The exit status is the number of parts that failed.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-$(command -v .venv/bin/python || command -v python3)}
output=gpu_check only=() again= emulated= list= longest=470
while (($#)); do
  case $1 in
    --output) output=${2:?--output needs a directory}; shift ;;
    --only) while (($# > 1)) && [[ $2 != --* ]]; do only+=("$2"); shift; done ;;
    --again) again=1 ;;
    --emulated) emulated=1 ;;
    --list) list=1 ;;
    --help | -h) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *) echo "gpu_check.sh: error: unknown argument '$1'; --help says what there is" >&2; exit 2 ;;
  esac
  shift
done

# name | seconds | GPU or any: what --emulated can run | command
tests() { echo "$1|$2|any|pytest -x -q -p no:cacheprovider tests/gpu/test_kernels_$1.py"; }
bench() { echo "$1|$2|any|benchmarks/gpu.py --timeout $((($2 - 60) / ($# - 2))) --output OUTPUT/$1_table.json --only ${*:3}"; }
parts() {
  echo "machine|60|GPU|nvidia-smi -L && PYTHON -m megatron_deepseek.ops"
  echo "build|$longest|any|PYTHON csrc/build.py --jobs $(getconf _NPROCESSORS_ONLN) $([[ $emulated ]] && echo --emulated || echo --or-keep)"
  # Products hang where a barrier is wrong: a short limit, before all else. Then one case under cuda-gdb tells where.
  echo "first_products|100|any|MEGATRON_DEEPSEEK_OPS=all=reference pytest -x -q -p no:cacheprovider tests/gpu/test_kernels_gemm.py -k 'dense and not tma_store and not clusters'"
  echo "gemm|240|any|pytest -x -q -p no:cacheprovider tests/gpu/test_kernels_gemm.py -k 'not tma_store and not clusters'"
  # Forms of the products that are used on request: what hangs here is not the default.
  echo "tma_store|120|any|pytest -x -q -p no:cacheprovider tests/gpu/test_kernels_gemm.py -k 'tma_store and not clusters'"
  echo "clusters|120|any|pytest -x -q -p no:cacheprovider tests/gpu/test_kernels_gemm.py -k clusters"
  tests quantize 240; tests e5m6 120; tests permute 120; tests rope 120; tests cross_entropy 120; tests forms 200
  tests traced 400; tests registration 240; tests model 240; tests alternatives 120
  bench products 460 products grouped_products
  bench layer 460 layer
  bench quantising 460 quantize
  bench others 460 routing rotary cross_entropy
  bench attention 200 attention
  # Where the time of a product goes: waits for global loads (long scoreboard) and the L2's rate.
  echo "profile|300|GPU|ncu --section WarpStateStats --section MemoryWorkloadAnalysis --kernel-name regex:gemm_kernel --launch-skip 12 --launch-count 2 PYTHON benchmarks/gpu.py --piece products --output OUTPUT/profiled.json --ceilings 1 1"
  echo "races|$longest|GPU|compute-sanitizer --tool racecheck --error-exitcode 9 PYTHON -m pytest -x -q tests/gpu/test_kernels_permute.py tests/gpu/test_kernels_quantize.py -k 'test_route or test_columns_of_groups'"
  echo "memory|$longest|GPU|compute-sanitizer --tool memcheck --error-exitcode 9 PYTHON -m pytest -x -q tests/gpu/test_kernels_gemm.py tests/gpu/test_kernels_rope.py -k 'not tall'"
  bench training $longest training
}

command_of() {  # a part's command, with the interpreter, the directory and the emulation in it
  local text=${1//OUTPUT/$output}
  text=${text//PYTHON /$python }
  text=${text/pytest -x/$python -m pytest -x}
  [[ $text == *"$python -m $python"* ]] && text=${text/$python -m $python -m/$python -m}
  [[ $text == benchmarks/* ]] && text="$python $text${emulated:+ --device cpu --small --emulated}"
  echo "$text"
}

record() {  # name outcome seconds status: the part's JSON, with the end of its log
  "$python" - "$output" "$@" <<'END' || exit 1
import json, sys
from datetime import datetime
from pathlib import Path
folder, name, outcome, seconds, status = sys.argv[1:]
log = Path(folder, f"{name}.log")
tail = log.read_text(errors="replace").splitlines()[-15:] if log.exists() else []
Path(folder, f"{name}.json").write_text(json.dumps({
    "part": name, "outcome": outcome, "seconds": int(seconds), "status": int(status), "tail": tail,
    "date": datetime.now().isoformat(timespec="seconds")}, indent=1) + "\n")
END
}

# What pytest counted: of tests that were skipped, nothing is known.
counts_of() { grep -E '^[0-9]+ (passed|failed|skipped|error)' "$output/$1.log" | tail -1 | sed 's/\(.*\) in .*/, \1/'; }

outcome_of() { sed -n 's/^ "outcome": "\(.*\)",$/\1/p' "$output/$1.json" 2>/dev/null; }

run_part() {  # name seconds kind command
  local name=$1 limit=$2 command status start=$SECONDS
  [[ -n $emulated ]] && limit=$longest
  if [[ -n $emulated && $3 == GPU ]]; then record "$name" "skipped: needs a GPU" 0 0; return; fi
  command=$(command_of "$4")
  local tool=${command%% *}
  if [[ $tool != *=* ]] && ! command -v "$tool" > /dev/null; then
    record "$name" "skipped: there is no $tool" 0 0; return
  fi
  echo "$command" > "$output/$name.log"
  timeout --kill-after=10 "$limit" bash -c "$command" >> "$output/$name.log" 2>&1
  status=$?
  local outcome=passed
  ((status)) && outcome=failed
  ((status == 124 || status == 137)) && outcome="failed: not done in $limit s"
  if [[ $outcome == passed ]]; then
    [[ $command == *pytest* ]] && ! grep -q ' passed' "$output/$name.log" && outcome="skipped: no test ran"
    grep -qs '"problem"' "$output/${name}_table.json" && outcome="failed: rows without a time in ${name}_table.json"
  fi
  record "$name" "$outcome" $((SECONDS - start)) $status
}

chosen() { ((${#only[@]} == 0)) || [[ " ${only[*]} " == *" $1 "* ]]; }

known=" $(parts | cut -d'|' -f1 | tr '\n' ' ')"
for name in "${only[@]}"; do
  [[ $known == *" $name "* ]] || { echo "gpu_check.sh: error: there is no part '$name'; there are$known" >&2; exit 2; }
done
if [[ -z $emulated$list ]] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_check.sh: error: $python sees no GPU; --emulated tries the script without one" >&2
  exit 2
fi
[[ -n $emulated ]] && export MEGATRON_DEEPSEEK_EMULATE=1
mkdir -p "$output"
output=$(realpath "$output")
failed=0
while IFS='|' read -r -u 3 name limit kind command; do
  chosen "$name" || continue
  if [[ -n $list ]]; then echo "$name ($limit s): $(command_of "$command")"; continue; fi
  if [[ -z $again && $(outcome_of "$name") == passed ]]; then
    echo "$name: passed before"
    continue
  fi
  run_part "$name" "$limit" "$kind" "$command"
  outcome=$(outcome_of "$name")
  if [[ $outcome == skipped* ]]; then echo "$name: $outcome"; else echo "$name: $outcome$(counts_of "$name"), log in $output/$name.log"; fi
  [[ $outcome == failed* ]] && failed=$((failed + 1))
done 3< <(parts)
exit $failed
