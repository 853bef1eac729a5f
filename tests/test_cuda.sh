#!/bin/sh
# test_cuda.sh - diffdpo_cuda.cu: on the CPU through a stand-in for CUDA, by nvcc for every architecture, on a GPU if there is one.
#
#   sh tests/test_cuda.sh
#
# 1. The stand-in (tests/cuda_stand_in.h): op tests, whole networks and training runs against the reference vectors, replayed
#    steps, errors.  Needs g++ alone.
# 2. nvcc: compiles without a warning for sm_80, sm_89, sm_90, sm_100 and as a fat binary, with cuDNN and NCCL where their headers
#    are, and links an example as the README says.  CUDA_ARCHS="90" chooses some.
# 3. A GPU: the same programs on it, and once under compute-sanitizer.  Skipped loudly where there is none.
# Environment: CC (cc), CXX (g++).  The last line is N passed, N failed, N skipped.
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

if have "$CXX"; then
    if step "the backend compiles as C++11" \
            $CXX -std=c++11 -O2 -fno-strict-aliasing $W -DDIFFDPO_CUDA_STAND_IN -x c++ -c diffdpo_cuda.cu -o $work/stand_in.o; then
        for p in test_ops parity cuda/checks; do
            step "$p with the stand-in" $CC -O1 $W -DDIFFDPO_CUDA -DSTAND_IN tests/$p.c $work/stand_in.o -o $work/"$(basename $p)" -lstdc++ -lm -lpthread
        done
        counts "ops" $work/test_ops
        counts "networks and training runs" $work/parity tests/golden/pixels --device cuda
        counts "types, steps, errors" $work/checks
    fi
else skip "the stand-in: no $CXX"; fi

# ------------------------------------------------------------------------------------------------ nvcc

nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
if [ -x "$nvcc" ]; then
    include=$(dirname "$(dirname "$nvcc")")/include
    strict="-std=c++11 -O3 -DDIFFDPO_CUDA -Werror all-warnings -Xcompiler -Wall,-Wextra"
    fat=
    for a in ${CUDA_ARCHS:-80 89 90 100}; do
        step "nvcc, sm_$a" "$nvcc" $strict -arch=sm_$a -c diffdpo_cuda.cu -o $work/sm_$a.o
        fat="$fat -gencode arch=compute_$a,code=sm_$a"
    done
    # shellcheck disable=SC2086
    [ -n "${CUDA_ARCHS:-}" ] || step "nvcc, fat" "$nvcc" $strict $fat -c diffdpo_cuda.cu -o $work/fat.o
    a=${CUDA_ARCHS:-90}
    a=${a%% *}
    if [ -f "$include/cudnn.h" ]; then step "nvcc, cuDNN" "$nvcc" $strict -arch=sm_$a -DDIFFDPO_CUDNN -c diffdpo_cuda.cu -o $work/cudnn.o
    else skip "cuDNN: no cudnn.h"; fi
    if [ -f "$include/nccl.h" ]; then step "nvcc, NCCL" "$nvcc" $strict -arch=sm_$a -DDIFFDPO_NCCL -c diffdpo_cuda.cu -o $work/nccl.o
    else skip "NCCL: no nccl.h"; fi
    step "the line of the README builds an example" "$nvcc" -O3 -arch=sm_$a -DDIFFDPO_CUDA examples/bench.c diffdpo_cuda.cu -lcublasLt -lpthread -o $work/bench
else skip "nvcc is not installed"; fi

# ------------------------------------------------------------------------------------------------ GPU

if [ -x "$nvcc" ] && have nvidia-smi && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    nvidia-smi -L
    step "the backend for this GPU" "$nvcc" -O3 -arch=native -DDIFFDPO_CUDA -c diffdpo_cuda.cu -o $work/gpu.o
    for p in test_ops parity cuda/checks; do
        step "$p on the GPU" "$nvcc" -O2 -DDIFFDPO_CUDA tests/$p.c $work/gpu.o -lcublasLt -lpthread -o $work/gpu_"$(basename $p)"
    done
    counts "ops on the GPU" $work/gpu_test_ops
    counts "types, steps, errors on the GPU" $work/gpu_checks
    for d in tests/golden/pixels tests/golden/latents; do counts "$d on the GPU" $work/gpu_parity $d --device cuda; done
    if have compute-sanitizer; then step "compute-sanitizer" compute-sanitizer --error-exitcode 9 $work/gpu_test_ops; else skip "compute-sanitizer is not installed"; fi
else
    echo "THERE IS NO GPU HERE: nothing of this was run on one"
    skip "ops, networks and training runs on a GPU"
fi
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
