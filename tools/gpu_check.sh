#!/usr/bin/env bash
# Runs everything of csrc/ that needs a GPU, in parts of less than 8 minutes, and says what passed.
#
#   tools/gpu_check.sh [--output DIRECTORY] [--only PART...] [--again] [--emulated] [--list]
#
# Each part leaves a log and a JSON file in the directory (default gpu_check/). What passed with these sources on this
# GPU is not run again, so the script goes on where it was ended (by Ctrl-C, too: the part under way ends with it);
# --again runs it all the same. A library of csrc/ that was brought is used where there is no nvcc. --emulated tries the
# script without a GPU, on the emulated kernels at toy sizes, all parts with the longest limit: its times mean nothing.
# PYTHON chooses the interpreter. The exit status is the number of parts that failed; 125 if a result could not be
# written, 130 or 143 if the script was ended, 2 for arguments that make no sense and where there is no GPU.
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

record() {  # name outcome seconds status: the part's JSON, with the end of its log; whole or not at all
  "$python" - "$output" "$device" "$sources" "$@" <<'END' && return
import json, sys
from datetime import datetime
from pathlib import Path
folder, device, sources, name, outcome, seconds, status = sys.argv[1:]
try:
    log, made = Path(folder, f"{name}.log"), Path(folder, f"{name}.json.partial")
    tail = log.read_text(errors="replace").splitlines()[-15:] if log.exists() else []
    made.write_text(json.dumps({
        "part": name, "outcome": outcome, "seconds": int(seconds), "status": int(status), "tail": tail,
        "device": device, "sources": sources, "date": datetime.now().isoformat(timespec="seconds")}, indent=1) + "\n")
    made.rename(Path(folder, f"{name}.json"))
except OSError as problem:
    sys.exit(f"gpu_check.sh: error: {name}: {outcome}, but {folder} does not take the result: {problem.strerror}")
END
  exit 125
}

# What pytest counted: of tests that were skipped, nothing is known.
counts_of() { grep -E '^[0-9]+ (passed|failed|skipped|error)' "$output/$1.log" | tail -1 | sed 's/\(.*\) in .*/, \1/'; }

field_of() { sed -n "s/^ \"$2\": \"\(.*\)\",$/\1/p" "$output/$1.json" 2>/dev/null; }

passed_before() {  # with these sources, on this device: what passed on the emulation has not passed on a GPU
  [[ $(field_of "$1" outcome) == passed && $(field_of "$1" device) == "$device" ]] &&
    [[ $(field_of "$1" sources) == "$sources" ]]
}

running=
ended() {  # by a signal: `timeout` hands it on to all that the part has started
  trap '' INT TERM HUP
  [[ -n $running ]] && kill -TERM "$running" 2>/dev/null && wait "$running"
  echo "gpu_check.sh: ended during ${name:-its start}; run it again to go on from there" >&2
  exit "$1"
}
trap 'ended 130' INT
trap 'ended 143' TERM HUP

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
  timeout --kill-after=10 "$limit" bash -c "$command" >> "$output/$name.log" 2>&1 &
  running=$!
  wait "$running"
  status=$? running=
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
device=emulation
name_gpu='import sys, torch; torch.cuda.is_available() or sys.exit(1); print(torch.cuda.get_device_name())'
if [[ -z $emulated$list ]] && ! device=$("$python" -c "$name_gpu"); then
  echo "gpu_check.sh: error: $python sees no GPU; --emulated tries the script without one" >&2
  exit 2
fi
[[ -n $emulated ]] && export MEGATRON_DEEPSEEK_EMULATE=1
sources=$(find csrc megatron_deepseek benchmarks tests/gpu tests/helpers tests/emulation -type f \
  -regex '.*\.\(py\|cuh?\|cpp\|h\)' -print0 | sort -z | xargs -0 sha256sum | sha256sum | cut -c1-16)
if ! mkdir -p "$output" || ! output=$(realpath "$output"); then
  echo "gpu_check.sh: error: there is no directory $output, and it cannot be made" >&2
  exit 2
fi
failed=0
while IFS='|' read -r -u 3 name limit kind command; do
  chosen "$name" || continue
  if [[ -n $list ]]; then echo "$name ($limit s): $(command_of "$command")"; continue; fi
  if [[ -z $again ]] && passed_before "$name"; then
    echo "$name: passed before"
    continue
  fi
  run_part "$name" "$limit" "$kind" "$command"
  outcome=$(field_of "$name" outcome)
  if [[ $outcome == skipped* ]]; then echo "$name: $outcome"; else echo "$name: $outcome$(counts_of "$name"), log in $output/$name.log"; fi
  [[ $outcome == failed* ]] && failed=$((failed + 1))
done 3< <(parts)
exit $failed
