#!/bin/sh
# test_cuda.sh - diffdpo_cuda.cu: on the CPU through a stand-in for CUDA, by nvcc for every architecture, on a GPU if there is one.
#
#   sh tests/test_cuda.sh            all three
#   sh tests/test_cuda.sh device     on the GPU alone: op tests, reference vectors, quickstart, compute-sanitizer, the comparison
#                                    with PyTorch; run.sh knows it as cuda_device
#
# 1. The stand-in (tests/cuda_stand_in.h): op tests, whole networks and training runs against the reference vectors, replayed
#    steps, errors.  Needs g++ alone.  Loads that are not aligned end a program with signal 4.
# 2. nvcc: compiles without a warning for sm_80, sm_89, sm_90 and sm_100, as one fat object, and for the first of them with cuDNN
#    and NCCL where their headers are; no kernel spills many registers; every example links.  CUDA_ARCHS="90" chooses some architectures
#    (then only bench is linked), "none" none.  All of them take a quarter of an hour of one processor.
# 3. A GPU: the same programs on it, and more.  Skipped loudly where there is none.
# Environment: CC (cc), CXX (g++), PEER_PYTHON (a Python with torch, diffusers and peft, for the comparison).
# The last line is N passed, N failed, N skipped.
cd "$(dirname "$0")/.." || exit 1
CC=${CC:-cc}
CXX=${CXX:-g++}
W="-Wall -Wextra"
work=build/cuda
passed=0 failed=0 skipped=0
mkdir -p $work

have() { command -v "$1" >/dev/null 2>&1; }
skip() { echo "SKIPPED $1"; skipped=$((skipped + 1)); }

# step NAME COMMAND...: passes if it succeeds and says nothing about warnings.
step() {
    name=$1
    shift
    if "$@" >$work/log 2>&1 && ! grep -q 'warning' $work/log; then passed=$((passed + 1)); echo "ok    $name"
    else failed=$((failed + 1)); echo "FAIL  $name"; tail -n 20 $work/log | sed 's/^/      /'; return 1; fi
}

# counts NAME COMMAND...: a program that ends with the line of counts, which are added.
counts() {
    name=$1
    shift
    "$@" >$work/log 2>&1
    status=$?
    last=$(grep -E '^[0-9]+ passed, [0-9]+ failed' $work/log | tail -n 1)
    grep -E 'FAIL|SKIPPED' $work/log | head -n 10
    if [ -z "$last" ] || { [ $status -ne 0 ] && [ "${last#*passed, 0 failed}" != "$last" ]; }; then
        echo "FAIL  $name: ended with status $status"; tail -n 5 $work/log; failed=$((failed + 1)); return
    fi
    echo "ok    $name: $last"
    passed=$((passed + ${last%% passed*}))
    f=${last#*passed, }
    failed=$((failed + ${f%% failed*}))
}

# ------------------------------------------------------------------------------------------------ stand-in

stand_in() {
    if have "$CXX"; then
        if step "the backend compiles as C++11" \
                $CXX -std=c++11 -O2 -fno-strict-aliasing -fsanitize=alignment -fsanitize-undefined-trap-on-error $W -DDIFFDPO_CUDA_STAND_IN -x c++ -c diffdpo_cuda.cu -o $work/stand_in.o; then
            for p in test_ops parity cuda/checks; do
                step "$p with the stand-in" $CC -O1 $W -DDIFFDPO_CUDA -DSTAND_IN tests/$p.c $work/stand_in.o -o $work/"$(basename $p)" -lstdc++ -lm -lpthread
            done
            counts "ops" $work/test_ops
            counts "networks and training runs" $work/parity tests/golden/pixels --device cuda
            counts "types, steps, errors" $work/checks
        fi
    else skip "the stand-in: no $CXX"; fi
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
    spills=$(grep -c '[1-9][0-9][0-9][0-9]* bytes spill stores' $work/log)
    if [ "$spills" = 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "FAIL  $name: $spills kernels spill 100 bytes and more"; fi
}

nvcc_all() {
    if [ "${CUDA_ARCHS:-}" = none ]; then skip "nvcc: CUDA_ARCHS is none"; return; fi
    [ -x "$nvcc" ] || { skip "nvcc is not installed"; return; }
    include=$(dirname "$(dirname "$nvcc")")/include
    archs=${CUDA_ARCHS:-80 89 90 100}
    fat=
    for a in $archs; do fat="$fat -gencode arch=compute_$a,code=sm_$a"; done
    # shellcheck disable=SC2086
    if compiled "nvcc, for sm_$(echo "$archs" | sed "s/ /, sm_/g") as one fat object" $work/fat.o $fat; then
        examples=bench
        [ -n "${CUDA_ARCHS:-}" ] || examples="bench train sample quickstart"
        for e in $examples; do
            step "examples/$e.c links with it" "$nvcc" -O1 -DDIFFDPO_CUDA "examples/$e.c" $work/fat.o -lcublas -lcublasLt -lpthread -o "$work/${e}_fat"
        done
    fi
    a=${archs%% *}
    [ -z "${CUDA_ARCHS:-}" ] || { skip "cuDNN and NCCL: only where CUDA_ARCHS names no architecture"; return; }
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
            --peer-args="--compile --channels_last --batch $4" >$work/log 2>&1; then
        passed=$((passed + 1))
        grep "^$1" $work/log
    else failed=$((failed + 1)); echo "FAIL  compare $1"; tail -n 5 $work/log; fi
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
    [ "$1" = all ] || return
    gpu_program quickstart && step "quickstart on the GPU" $work/gpu_quickstart --device cuda --steps 20 --model examples/emoji --out $work
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

if [ "${1:-}" = device ]; then device all
else stand_in; nvcc_all; device some; fi
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
