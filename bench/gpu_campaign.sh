#!/usr/bin/env bash
# All tests and measurements on a machine with one NVIDIA GPU, in two runs of less than six minutes each:
#
#   bench/gpu_campaign.sh OUT correctness          the tests, golden vectors, compute-sanitizer
#   bench/gpu_campaign.sh OUT figures              every measurement
#   bench/gpu_campaign.sh OUT matrix=500 rest      these stages, the first one in 500 seconds
#
# It needs a checkout and CuPy for CUDA 12 or 13, but neither network nor filled caches. PyTorch is a peer if installed.
# Results are written to OUT/<device>-<date>-<commit>/: log.txt (with the facts of the machine), tests-<time>.xml,
# passed.txt, the golden vectors, memcheck.txt, racecheck.txt, micro.json, first.json, tiles.json, rest.json and
# summary.md. A stage that fails or exceeds its time keeps its partial results, and the next stage begins. A run ends by
# printing what it did not reach; another run on the same commit resumes there. The variable COMMIT names the commit if
# there is no git. `SMALL=1 python -m tests.cupy_on_cpu bench/gpu_campaign.sh OUT figures` runs tiny layers and needs no
# GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
out=${1:?usage: bench/gpu_campaign.sh OUT correctness|figures|STAGE[=SECONDS] ...}
shift

correctness=(facts tests golden memcheck racecheck matrix)
figures=(facts compile micro first tiles rest summary)
anew=(facts compile summary)  # repeated by every run: their results apply to the current machine only
declare -A seconds=(
    [facts]=20 [tests]=130 [golden]=15 [memcheck]=30 [racecheck]=30 [matrix]=80
    [compile]=50 [micro]=40 [first]=100 [tiles]=35 [rest]=35 [summary]=10
)
grace=8  # seconds from the interrupt of a stage until it is killed
stages=()
for word in "$@"; do
    name=${word%%=*}
    if [[ $word == correctness ]]; then
        stages+=("${correctness[@]}")
    elif [[ $word == figures ]]; then
        stages+=("${figures[@]}")
    elif [[ $word =~ ^[a-z]+(=[1-9][0-9]*)?$ && -n ${seconds[$name]:-} ]]; then
        [[ $word == *=* ]] && seconds[$name]=${word#*=}
        stages+=("$name")
    else
        echo "gpu_campaign.sh: no run or stage $word; there are correctness (${correctness[*]}), figures" \
            "(${figures[*]}), and each stage with =SECONDS if wanted" >&2
        exit 2
    fi
done
[[ ${#stages[@]} -gt 0 ]] || { echo 'gpu_campaign.sh: name correctness, figures, or stages' >&2; exit 2; }

PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
GPUCONV_CACHE_DIR=${GPUCONV_CACHE_DIR:-${TMPDIR:-/tmp}/gpuconv-campaign}
GPUCONV_BACKEND=cupy
export PYTHONPATH GPUCONV_CACHE_DIR GPUCONV_BACKEND PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
# Background processes may ignore SIGINT, which ends a stage, so its default action is restored.
heeding=(env --default-signal=INT)
"${heeding[@]}" true 2> /dev/null || heeding=()  # an older env

first=(quick resnet50 mobilenet audio1d unet3d jsense)
rest=(vgg16 convnext replknet stems grouped dilated transposed patch deepbench)
dtypes=float32,tf32,float16,bfloat16,float64,complex64
if [[ -n ${SMALL:-} ]]; then
    device=emulated first=(quick resnet50) rest=(vgg16 transposed) dtypes=float32
    run() {
        [[ $1 == -m ]] || set -- -m tests.cupy_on_cpu.small "$@"
        "${heeding[@]}" "$python" "$@"
    }
else
    device=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr -c 'A-Za-z0-9\n' -)
    run() {
        case $1 in
            gpuconv) "${heeding[@]}" "$python" -m "$@" ;;
            *) "${heeding[@]}" "$python" "$@" ;;
        esac
    }
fi
[[ -n $device ]] || { echo 'gpu_campaign.sh: nvidia-smi names no GPU' >&2; exit 2; }
commit=${COMMIT:-$(git describe --always --dirty=+ --exclude='*' 2> /dev/null || echo unknown)}
again='the same command resumes there'
folder=$(compgen -G "$out/$device-[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]-$commit" | tail -n 1)  # of an earlier run
if [[ $commit == *+ || $commit == unknown ]]; then  # the files may differ each time
    folder="$out/$device-$(date -u +%Y-%m-%d-%H%M%S)-$commit"
    again='each run starts again, because COMMIT does not name a commit'
fi
folder=${folder:-$out/$device-$(date -u +%Y-%m-%d)-$commit}
mkdir -p "$folder" || exit 2
peers=$("$python" -c 'import importlib.util as u; print("torch" if u.find_spec("torch") else "")')

facts() {
    date -u
    git log -1 --oneline
    git status --short --untracked-files=no
    command -v nvidia-smi > /dev/null && nvidia-smi -q -d CLOCK,POWER,MEMORY,TEMPERATURE && nvidia-smi
    "$python" -m pip list 2> /dev/null | grep -iE 'cupy|numpy|torch|nvidia|cuda|pytest|xdist|ml.dtypes|rich'
    run gpuconv info
}

pytest() {
    local status=0
    # With "--done FILE" pytest takes an existing FILE for a test, since tests/conftest.py has not declared --done yet.
    run -m pytest -m gpu -n 6 -p no:cacheprovider -q --maxfail=200 --done="$folder/passed.txt" "$@" || status=$?
    [[ $status == 5 && -s $folder/passed.txt ]] && status=0  # all passed in an earlier run
    return $status
}

tests() { pytest --junitxml="$folder/tests-$(date -u +%H%M%S).xml" ${SMALL:+tests/test_golden.py tests/test_cupy.py}; }

matrix() { pytest --full ${SMALL:+tests/test_golden.py}; }

golden() { run tests/golden/make_golden.py "$folder"; }

sanitizer() {
    local checked=(compute-sanitizer --tool "$1" --error-exitcode 9)
    [[ -n ${SMALL:-} ]] && checked=()  # the emulator has checks of its own
    [[ ${#checked[@]} == 0 ]] || command -v compute-sanitizer || { echo 'compute-sanitizer is not installed'; return 1; }
    "${heeding[@]}" "${checked[@]}" "$python" ${SMALL:+-m tests.cupy_on_cpu.small} bench/short_matrix.py \
        > "$folder/$1.txt" 2>&1
    local status=$?
    tail -n 5 "$folder/$1.txt"
    return $status
}

memcheck() { sanitizer memcheck; }

racecheck() { sanitizer racecheck; }

compile() { run bench/compile_kernels.py --dtype "$dtypes" "${first[@]}" "${rest[@]}"; }

micro() { run bench/micro.py --json "$folder/micro.json"; }

suites() {
    local file=$1
    shift
    run gpuconv bench "$@" --dtype "$dtypes" --seconds 0.02 ${peers:+--peer "$peers"} \
        --json "$folder/$file" --resume > "$folder/$file.txt"
    local status=$?
    tail -n 30 "$folder/$file.txt"
    rm -f "$folder/$file.txt"
    return $status
}

first() { suites first.json "${first[@]}"; }

rest() { suites rest.json "${rest[@]}"; }

tiles() { run bench/tune_tiles.py --json "$folder/tiles.json"; }

summary() { "$python" bench/report.py --campaign "$folder"; }

is_done() { [[ $(grep "^=== $1: status " "$folder/log.txt" | tail -n 1) == *': status 0 '* ]]; }

# Runs a stage within its time limit and prints its status. Its processes are interrupted first, to write their results.
job='' watch=''
stage() {
    local name=$1 limit=${seconds[$1]} start=$SECONDS status
    if [[ " ${anew[*]} " != *" $name "* ]] && is_done "$name"; then
        echo "=== $name was done by an earlier run"
        return
    fi
    [[ -n ${SMALL:-} ]] && limit=$((3 * limit))  # machines with a GPU have more cores
    echo "=== $name, at most $limit s ($SECONDS s)"
    set -m
    "$name" &
    job=$!
    (
        sleep "$limit"
        kill -INT -- "-$job"
        sleep "$grace"
        kill -KILL -- "-$job"
    ) > /dev/null 2>&1 &
    watch=$!
    set +m
    wait "$job"
    status=$?
    kill -- "-$watch" 2> /dev/null
    wait "$watch" 2> /dev/null
    echo "=== $name: status $status after $((SECONDS - start)) s of $limit s"
}

touch "$folder/log.txt"
{
    trap '[[ -n $watch ]] && kill -- "-$job" "-$watch" 2> /dev/null; exit 143' INT TERM
    for name in "${stages[@]}"; do stage "$name"; done
    echo "=== done after $SECONDS s: $folder"
} 2>&1 | tee -a "$folder/log.txt"
left=()
for name in "${stages[@]}"; do is_done "$name" || left+=("$name"); done
if [[ ${#left[@]} -gt 0 ]]; then
    echo "=== not reached, or with errors: ${left[*]}; $again"
    exit 1
fi
