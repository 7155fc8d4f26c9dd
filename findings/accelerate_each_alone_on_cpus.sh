#!/usr/bin/env bash
# accelerate 1.15.0: two processes on a machine without a GPU each believe that they are alone, without a word.
#
# Expected: a script with Accelerator() or PartialState() and nothing else is what accelerate's documentation shows for
# any hardware, and `torchrun --nproc-per-node 2` and `accelerate launch --num_processes 2` are the documented ways to
# start it twice. On two processes it should see two: share what it is given, write once, reduce over both. The
# launchers set RANK and WORLD_SIZE, and gloo is there.
#
# What happens, on CPUs:
#   torchrun --nproc-per-node 2                     two processes, each "0 of 1" and each the main one
#   accelerate launch --multi_gpu --num_processes 2 the same
#   accelerate launch --cpu --num_processes 2       one process, "0 of 1"; the number is not mentioned again
#   torchrun --nproc-per-node 2, PartialState(cpu=True) in the script: the only one that sees 2
# A group is joined only if a card is found or cpu=True is passed in the script; what the launcher says of WORLD_SIZE is
# not looked at otherwise. Nothing is printed about it.
#
# Versions: torch 2.13.0, accelerate 1.15.0.
#
# Why it matters: calibration and evaluation of models on CPU machines are sharded by such scripts. split_between_processes
# gives each process everything, so the work is done twice and takes as long as alone; and is_main_process is true in
# both, so both write the same output at the same time. Scripts are tried on a CPU machine before they go to a cluster.
#
# Exit status: 0 if this is what happens, 1 if not (any more). On Linux without a GPU,
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu makes the download small.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --quiet --no-compile torch==2.13.0 accelerate==1.15.0 numpy
cd "$folder"
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES="" PATH="$folder/venv/bin:$PATH"
cat > plain.py <<'PYTHON'
from accelerate import PartialState

state = PartialState()
with state.split_between_processes([1, 2, 3, 4]) as mine:
    print("process", state.process_index, "of", state.num_processes, "main", state.is_main_process, "has", mine, flush=True)
PYTHON
sed 's/PartialState()/PartialState(cpu=True)/' plain.py > told.py

seen() { "$@" 2>/dev/null | grep '^process' | sort; }
check() { # name, expected lines, command
    local name=$1 expected=$2 found
    shift 2
    found=$(seen "$@")
    printf '%s\n%s\n' "$name" "$found"
    if [ "$found" != "$expected" ]; then
        printf 'expected:\n%s\n' "$expected"
        exit 1
    fi
}
alone="process 0 of 1 main True has [1, 2, 3, 4]"
check "torchrun, 2 processes" "$alone
$alone" torchrun --nproc-per-node 2 plain.py
check "accelerate launch --multi_gpu, 2 processes" "$alone
$alone" accelerate launch --multi_gpu --num_processes 2 plain.py
check "accelerate launch --cpu, 2 processes asked for" "$alone" accelerate launch --cpu --num_processes 2 plain.py
check "torchrun, 2 processes, PartialState(cpu=True)" "process 0 of 2 main True has [1, 2]
process 1 of 2 main False has [3, 4]" torchrun --nproc-per-node 2 told.py
versions=$(python -c 'import accelerate, torch; print("torch", torch.__version__, "accelerate", accelerate.__version__)')
echo "$versions: as described"
