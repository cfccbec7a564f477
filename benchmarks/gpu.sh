#!/usr/bin/env bash
# Every test and benchmark that needs an NVIDIA GPU, in less than nine minutes, from the root of the repository:
#
#   benchmarks/gpu.sh [WHAT PYTEST IS GIVEN, default: tests]
#
# PYTHON is the interpreter (default .venv/bin/python, else python3), RESULTS the folder for logs and the plot (default: a
# new one). Exit status 3: there is no GPU; 1: a test failed or a benchmark broke. A benchmark that runs out of time is
# cut off and says so, which is no failure.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

TESTS_S=170
KERNELS_S=120
STEP_S=45
LOSSES_S=30
MODEL_S=60
DATA_S=60
LABEL_S=35
SMALL_S=15 # 535 in all

[ -x .venv/bin/python ] && default=.venv/bin/python || default=python3
PYTHON=${PYTHON:-$default}

if ! hardware=$("$PYTHON" -c 'import torch; torch.cuda.init(); print(torch.cuda.get_device_name())' 2>/dev/null); then
    echo "no NVIDIA GPU that torch can use here ($PYTHON): nothing was run"
    exit 3
fi
RESULTS=${RESULTS:-$(mktemp -d -t gpu-XXXXXX)}
mkdir -p "$RESULTS" || exit 2
export PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
"$PYTHON" -c 'import torch, triton; print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, triton {triton.__version__}")'
echo "$hardware; results in $RESULTS"

rows=()
failed=0

step() { # NAME SECONDS COMMAND...: runs it for at most so long, and remembers how it went
    local name=$1 limit=$2 begun=$SECONDS status result
    shift 2
    echo
    echo "## $name"
    timeout -k 10 "$limit" "$@" 2>&1 | tee "$RESULTS/$name.log"
    status=${PIPESTATUS[0]}
    case $status in
        0) result=passed ;;
        124 | 137) result="cut off after $limit s" ;;
        *) result="FAILED with status $status" ;;
    esac
    # Tests that do not end are tests that failed.
    if [ "$status" != 0 ] && { [ "$result" != "cut off after $limit s" ] || [ "$name" = tests ]; }; then failed=1; fi
    rows+=("| $name | $result | $((SECONDS - begun)) |")
}

# By convention every test that is skipped without a GPU has the marker. Side by side, because most of their time is
# Triton's compiler, which takes a processor each.
parallel=()
"$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n 6 --dist load)
step tests "$TESTS_S" "$PYTHON" -m pytest -m gpu -q --durations=10 -p no:cacheprovider "${parallel[@]}" "${@:-tests}"
# The last case that is begun must have time to end. The first cases are those that the targets are about; whoever wants
# all of them runs the benchmark alone.
step bench_kernels "$KERNELS_S" "$PYTHON" benchmarks/bench_kernels.py --device cuda --case-s 4 \
    --limit-s $((KERNELS_S - 40)) --plot "$RESULTS/bench_kernels.png"
step bench_step "$STEP_S" "$PYTHON" benchmarks/bench_step.py --device cuda --preset v2-vitl --batch 16 --size 518 \
    --steps 20
step bench_losses "$LOSSES_S" "$PYTHON" benchmarks/bench_losses.py --device cuda --preset v2-vitl --batch 16 --repeats 15
# What the data plane delivers beside what a small network consumes.
step bench_losses_small "$SMALL_S" "$PYTHON" benchmarks/bench_losses.py --device cuda --preset v2-vits --batch 32 --repeats 5
step bench_data "$DATA_S" "$PYTHON" benchmarks/bench_data.py --device cuda --threads "$(nproc)" --batch 24 \
    --images 192 --repeats 1
step bench_label "$LABEL_S" "$PYTHON" benchmarks/bench_label.py --device cuda --preset v2-vits --precision bf16 --images 64 \
    --repeats 1 --threads "$(nproc)" --workers 1 --no-levels
step bench_model "$MODEL_S" "$PYTHON" benchmarks/bench_model.py --device cuda --batch 8 --repeats 15

echo
echo "## $hardware"
echo
echo "| | result | s |"
echo "|---|---|---|"
printf '%s\n' "${rows[@]}"
exit "$failed"
