#!/bin/sh
# test_cuda.sh - diffdpo_cuda.cu: on the CPU through a stand-in for CUDA, by nvcc for every architecture, on a GPU if there is one.
#
#   sh tests/test_cuda.sh            all three, all of it
#   sh tests/test_cuda.sh quick      two minutes: fewer shapes and runs; of nvcc one architecture, without linking.  So, too, where
#                                    CUDA_ARCHS is set, as run.sh's default suite does
#   sh tests/test_cuda.sh device     on the GPU alone: op tests, reference vectors, quickstart, compute-sanitizer, the comparison
#                                    with PyTorch; run.sh knows it as cuda_device
#
# 1. The stand-in (tests/cuda_stand_in.h): op tests, whole networks and training runs against the reference vectors, and call by
#    call against the CPU, replayed steps, errors.  Needs g++ alone.  Loads that are not aligned end a program with signal 4.
#    Shapes come from SEED, which is the day's number unless it is set.  All: cuDNN's and NCCL's places, too, and the
#    latent networks.
# 2. nvcc: compiles without a warning for sm_80, sm_89, sm_90 and sm_100, as one fat object, and for the first of them with cuDNN
#    and NCCL where their headers are; no kernel spills many registers; every example links.  CUDA_ARCHS="90" chooses some
#    architectures, "none" none.  One takes a minute of a processor.
# 3. A GPU: the same programs on it, and more.  Skipped loudly where there is none.
# Environment: CC (cc), CXX (g++), PEER_PYTHON (a Python with torch, diffusers and peft, for the comparison).
# The last line is N passed, N failed, N skipped.
cd "$(dirname "$0")/.." || exit 1
CC=${CC:-cc}
CXX=${CXX:-g++}
W="-Wall -Wextra"
quick=
if [ "${1:-}" = quick ] || [ "${CUDA_ARCHS:-}" ]; then quick=1; fi
seed=${SEED:-$(($(date +%s) / 86400))}
work=build/cuda
log=$work/log
passed=0 failed=0 skipped=0
mkdir -p $work

have() { command -v "$1" >/dev/null 2>&1; }
skip() { echo "SKIPPED $1"; skipped=$((skipped + 1)); }

# step NAME COMMAND...: passes if it succeeds and says nothing about warnings.
step() {
    name=$1
    shift
    if "$@" >$log 2>&1 && ! grep -q 'warning' $log; then passed=$((passed + 1)); echo "ok    $name"
    else failed=$((failed + 1)); echo "FAIL  $name"; tail -n 20 $log | sed 's/^/      /'; return 1; fi
}

. tests/counts.sh

# ------------------------------------------------------------------------------------------------ stand-in

# stand_in_object FILE ARGUMENTS...: the backend as a C++ compiler sees it.
stand_in_object() {
    file=$1
    shift
    # shellcheck disable=SC2086
    $CXX -std=c++11 -O2 -fno-strict-aliasing -fsanitize=alignment -fsanitize-undefined-trap-on-error $W \
        -DDIFFDPO_CUDA_STAND_IN "$@" -x c++ -c diffdpo_cuda.cu -o "$file"
}

# stand_in_program NAME OBJECT PROGRAM ARGUMENTS...: the CPU beside it in plain C, which is the oracle anyway.
stand_in_program() {
    name=$1 object=$2 program=$3
    shift 3
    # shellcheck disable=SC2086
    $CC -O1 $W -DDIFFDPO_CUDA -DSTAND_IN -DDIFFDPO_NO_SIMD "$@" "tests/$name.c" "$object" -o "$program" -lstdc++ -lm -lpthread
}

stand_in() {
    have "$CXX" || { skip "the stand-in: no $CXX"; return; }
    step "the backend compiles as C++11" stand_in_object $work/stand_in.o || return
    for p in test_ops parity cuda/checks; do
        step "$p with the stand-in" stand_in_program $p $work/stand_in.o $work/"$(basename $p)"
    done
    counts "ops" $work/test_ops
    if [ "$quick" ]; then
        counts "networks and training runs, call by call" $work/parity tests/golden/pixels --device check
        counts "types, steps, errors, seed $seed" $work/checks "$seed" quick
        return
    fi
    for d in tests/golden/pixels ../shared/golden/sd15; do
        if [ -d $d ]; then counts "$d" $work/parity $d --device cuda; fi
    done
    counts "networks and training runs, call by call" $work/parity tests/golden/pixels --device check
    counts "types, steps, errors, seed $seed" $work/checks "$seed" 408
    step "with cuDNN's and NCCL's places" stand_in_object $work/more_stand_in.o -DDIFFDPO_CUDNN -DDIFFDPO_NCCL &&
        step "checks with them" stand_in_program cuda/checks $work/more_stand_in.o $work/more_checks -DDIFFDPO_CUDNN -DDIFFDPO_NCCL &&
        for part in types "sums over"; do counts "$part, with them" $work/more_checks "$seed" 204 "$part"; done
}

# ------------------------------------------------------------------------------------------------ nvcc

nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
strict="-std=c++11 -O3 -DDIFFDPO_CUDA -Werror all-warnings -Xcompiler -Wall,-Wextra -Xptxas -v"

# compiled NAME FILE ARGUMENTS...: diffdpo_cuda.cu to FILE; no warning, and no kernel spills 100 bytes of registers or more (some
# lay away a few before their loop, which costs nothing).
compiled() {
    name=$1 file=$2
    shift 2
    # shellcheck disable=SC2086
    step "$name" "$nvcc" $strict "$@" -c diffdpo_cuda.cu -o "$file" || return 1
    spills=$(grep -c '[1-9][0-9][0-9][0-9]* bytes spill stores' $log)
    if [ "$spills" = 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "FAIL  $name: $spills kernels spill 100 bytes and more"; fi
}

nvcc_all() {
    if [ "${CUDA_ARCHS:-}" = none ]; then skip "nvcc: CUDA_ARCHS is none"; return; fi
    [ -x "$nvcc" ] || { skip "nvcc is not installed"; return; }
    include=$(dirname "$(dirname "$nvcc")")/include
    archs=${CUDA_ARCHS:-80 89 90 100}
    [ ! "$quick" ] || archs=${CUDA_ARCHS:-90}
    fat=
    for a in $archs; do fat="$fat -gencode arch=compute_$a,code=sm_$a"; done
    # shellcheck disable=SC2086
    if compiled "nvcc, for sm_$(echo "$archs" | sed "s/ /, sm_/g") as one fat object" $work/fat.o $fat && [ ! "$quick" ]; then
        for e in bench train sample quickstart; do
            step "examples/$e.c links with it" "$nvcc" -O1 -DDIFFDPO_CUDA "examples/$e.c" $work/fat.o -lcublas -lcublasLt -lpthread -o "$work/${e}_fat"
        done
    fi
    a=${archs%% *}
    [ ! "$quick" ] || return
    if [ -f "$include/cudnn.h" ] && [ -f "$include/nccl.h" ]; then
        compiled "nvcc, with cuDNN and NCCL" $work/more.o "-arch=sm_$a" -DDIFFDPO_CUDNN -DDIFFDPO_NCCL &&
            step "an example links with them" "$nvcc" -O1 -DDIFFDPO_CUDA examples/bench.c $work/more.o -lcublasLt -lcudnn -lnccl -lpthread -o $work/bench_more
    else skip "cuDNN and NCCL: their headers are not installed"; fi
}

# ------------------------------------------------------------------------------------------------ GPU

# gpu_program NAME: tests/NAME.c or examples/NAME.c for this GPU.
gpu_program() {
    source=tests/$1.c
    [ -f "$source" ] || source=examples/$1.c
    step "$1 for this GPU" "$nvcc" -O2 -DDIFFDPO_CUDA "$source" $work/gpu.o -lcublas -lcublasLt -lpthread -o "$work/gpu_$(basename "$1")"
}

# compare WORK DTYPE OURS THEIRS: a line of ../shared/bench/compare.py, each side at its own batch.
compare() {
    if "$PEER_PYTHON" ../shared/bench/compare.py $work/gpu_bench "$PEER_PYTHON" "$1" --dtype "$2" --device cuda --batch "$3" \
            --peer-args="--compile --channels_last --batch $4" >$log 2>&1; then
        passed=$((passed + 1))
        grep "^$1" $log
    else failed=$((failed + 1)); echo "FAIL  compare $1"; tail -n 5 $log; fi
}

device() {
    if [ ! -x "$nvcc" ] || ! have nvidia-smi || ! nvidia-smi -L 2>/dev/null | grep -q GPU; then
        echo "THERE IS NO GPU HERE: nothing of this was run on one"
        skip "ops, networks and training runs on a GPU"
        return
    fi
    nvidia-smi -L
    step "the backend for this GPU" "$nvcc" -O3 -lineinfo -arch=native -DDIFFDPO_CUDA -c diffdpo_cuda.cu -o $work/gpu.o || return
    for p in test_ops parity cuda/checks; do gpu_program $p; done
    counts "ops on the GPU" $work/gpu_test_ops
    counts "types, steps, errors on the GPU" $work/gpu_checks
    for d in tests/golden/* ../shared/golden/*; do
        if [ -d "$d" ]; then counts "$d on the GPU" $work/gpu_parity "$d" --device cuda; fi
    done
    counts "each call beside the CPU's" $work/gpu_parity tests/golden/pixels --device check
    [ "$1" = all ] || return
    gpu_program quickstart && step "quickstart, each call beside the CPU's" $work/gpu_quickstart --device check --steps 2 --model examples/emoji --out $work
    [ -x $work/gpu_quickstart ] && step "quickstart on the GPU" $work/gpu_quickstart --device cuda --steps 20 --model examples/emoji --out $work
    if have compute-sanitizer; then
        for tool in memcheck racecheck synccheck initcheck; do
            step "compute-sanitizer, $tool" compute-sanitizer --tool $tool --error-exitcode 9 $work/gpu_checks 1 34
        done
    else skip "compute-sanitizer is not installed"; fi
    if [ -n "${PEER_PYTHON:-}" ] && [ -f ../shared/bench/compare.py ] && gpu_program bench; then
        compare sd15_dpo_lora bf16 16 16
        compare sd15_dpo_full bf16 16 16
        compare sdxl_dpo_lora bf16 4 4
        compare sdxl_dpo_full bf16 2 2
    else skip "the comparison with PyTorch: PEER_PYTHON is not set"; fi
}

# nvcc beside the stand-in: two processors have time for both.
both() {
    (log=$work/nvcc.log; nvcc_all >$work/nvcc.out; echo "$passed $failed $skipped" >$work/nvcc.counts) &
    stand_in
    wait
    cat $work/nvcc.out
    read -r p f s <$work/nvcc.counts
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
}

if [ "${1:-}" = device ]; then device all
elif [ "$quick" ]; then both; device some
else stand_in; nvcc_all; device some; fi
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
