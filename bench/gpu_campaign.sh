#!/usr/bin/env bash
# Everything that is to be learnt on a machine with one NVIDIA GPU, in one go of less than nine minutes:
#
#   bench/gpu_campaign.sh OUT                      all stages
#   bench/gpu_campaign.sh OUT tests rest=400       these stages, the second one in 400 seconds
#
# From a checkout, with CuPy for CUDA 12 or 13, PyTorch if there is one, and no network. Results go to
# OUT/<device>-<date>-<commit>/, at most eight files: log.txt (with the machine's facts), tests.xml, the golden vectors,
# micro.json, first.json, rest.json, tiles.json and summary.md. A stage that fails or runs out of its time leaves what
# it had, and the next one begins. Without a GPU, `SMALL=1 python -m tests.cupy_on_cpu bench/gpu_campaign.sh OUT` runs
# every stage with tiny layers.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
out=${1:?usage: bench/gpu_campaign.sh OUT [STAGE[=SECONDS]...]}
shift

stages=(facts compile tests golden sanitizer micro first rest tiles summary)
declare -A seconds=(
    [facts]=10 [compile]=60 [tests]=105 [golden]=15 [sanitizer]=60 [micro]=50 [first]=120 [rest]=40 [tiles]=50 [summary]=10
)
chosen=()
for stage in "$@"; do
    name=${stage%%=*}
    if [[ -z ${seconds[$name]:-} || ! $stage =~ ^[a-z]+(=[1-9][0-9]*)?$ ]]; then
        echo "gpu_campaign.sh: no stage $stage; there are ${stages[*]}, each with =SECONDS if wanted" >&2
        exit 2
    fi
    [[ $stage == *=* ]] && seconds[$name]=${stage#*=}
    chosen+=("$name")
done
[[ ${#chosen[@]} -gt 0 ]] || chosen=("${stages[@]}")

PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
GPUCONV_CACHE_DIR=${GPUCONV_CACHE_DIR:-${TMPDIR:-/tmp}/gpuconv-campaign}
GPUCONV_BACKEND=cupy
export PYTHONPATH GPUCONV_CACHE_DIR GPUCONV_BACKEND PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
# What runs in the background may have been told to ignore the interrupt that ends a stage.
heeding=(env --default-signal=INT)
"${heeding[@]}" true 2> /dev/null || heeding=()  # an older env
python() { "${heeding[@]}" "$python" "$@"; }

if [[ -n ${SMALL:-} ]]; then
    device=emulated
    run() { python -m tests.cupy_on_cpu.small "$@"; }
else
    device=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr -c 'A-Za-z0-9\n' -)
    run() {
        case $1 in
            gpuconv) python -m "$@" ;;
            *) python "$@" ;;
        esac
    }
fi
[[ -n $device ]] || { echo 'gpu_campaign.sh: nvidia-smi names no GPU' >&2; exit 2; }
folder="$out/$device-$(date -u +%Y-%m-%d)-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
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

compile() { run bench/compile_kernels.py; }

tests() {
    local parallel=()
    "$python" -c 'import xdist' 2> /dev/null && parallel=(-n 6)
    python -m pytest ${SMALL:+tests/test_golden.py tests/test_cupy.py} -m gpu -p no:cacheprovider -q --maxfail=200 --junitxml="$folder/tests.xml" "${parallel[@]}"
}

golden() { run tests/golden/make_golden.py "$folder"; }

sanitizer() {
    local tool status=0 found
    found=$(mktemp)
    for tool in memcheck racecheck; do
        if command -v compute-sanitizer > /dev/null; then
            compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" bench/short_matrix.py > "$found" 2>&1 || status=$?
        else
            run bench/short_matrix.py > "$found" 2>&1 || status=$?
        fi
        echo "== $tool"
        head -c 20000 "$found"
        tail -n 3 "$found"
    done
    rm -f "$found"
    return $status
}

micro() { run bench/micro.py --json "$folder/micro.json"; }

suites() {
    local file=$1 dtypes=float32,tf32,float16,bfloat16,float64,complex64
    shift
    [[ -n ${SMALL:-} ]] && { dtypes=float32 && set -- "${@:1:2}"; }
    run gpuconv bench "$@" --dtype "$dtypes" --seconds 0.02 \
        ${peers:+--peer "$peers"} --json "$folder/$file" > "$folder/$file.txt"
    local status=$?
    tail -n 30 "$folder/$file.txt"
    rm -f "$folder/$file.txt"
    return $status
}

first() { suites first.json quick resnet50 mobilenet audio1d unet3d jsense; }

rest() { suites rest.json vgg16 convnext replknet stems grouped dilated transposed patch deepbench; }

tiles() { run bench/tune_tiles.py --json "$folder/tiles.json"; }

summary() { "$python" bench/report.py --campaign "$folder"; }

# A stage in its time, and a word on how it ended. What it started gets an interrupt first, to write down what it has.
stage() {
    local name=$1 limit=${seconds[$1]} start=$SECONDS status
    [[ -n ${SMALL:-} ]] && limit=$((3 * limit))  # a GPU's machine has more cores
    echo "=== $name, at most $limit s ($SECONDS s)"
    set -m
    "$name" &
    local job=$!
    (
        sleep "$limit"
        kill -INT -- "-$job"
        sleep 8
        kill -KILL -- "-$job"
    ) > /dev/null 2>&1 &
    local watch=$!
    set +m
    wait "$job"
    status=$?
    kill -- "-$watch" 2> /dev/null
    wait "$watch" 2> /dev/null
    echo "=== $name: status $status after $((SECONDS - start)) s of $limit s"
}

{
    for name in "${chosen[@]}"; do stage "$name"; done
    echo "=== done after $SECONDS s: $folder"
} 2>&1 | tee -a "$folder/log.txt"
if [[ -n ${SMALL:-} ]]; then  # of which nothing may fail
    ! grep -E '^=== .*: status [^0]' "$folder/log.txt"
fi
