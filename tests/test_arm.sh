#!/bin/sh
# test_arm.sh - the kernels on arm64: built by Debian's cross compiler, run by qemu-user.
#
#   sh tests/test_arm.sh         kernels, ops, and the reference cases of tests/golden, with NEON and in plain C
#
# Needs gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user; says so and passes where they are not.  On an arm64
# machine the other tests are this one.  The last line is N passed, N failed, N skipped.
cd "$(dirname "$0")/.." || exit 1
work=build/arm
log=$work/log
passed=0 failed=0 skipped=0
mkdir -p $work
cc=aarch64-linux-gnu-gcc
qemu=$(command -v qemu-aarch64 || command -v qemu-aarch64-static)
if ! command -v $cc >/dev/null 2>&1 || [ -z "$qemu" ]; then
    echo "SKIPPED arm64: needs gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user"
    echo "0 passed, 0 failed, 1 skipped"
    exit 0
fi

. tests/counts.sh

# -idirafter: stb lies among this machine's own headers.
compile() { $cc -O1 -Wall -Wextra -static -idirafter /usr/include "tests/$1.c" -o "$work/$1" -lm -lpthread >"$work/$1.log" 2>&1; }

# One warning is one failure.
built() {
    if [ -x "$work/$1" ] && ! grep -q warning "$work/$1.log"; then passed=$((passed + 1))
    else failed=$((failed + 1)); echo "FAIL build of $1"; head -n 10 "$work/$1.log"; fi
}

rm -f $work/test_kernels $work/test_ops $work/parity
compile test_kernels & compile test_ops
wait
compile parity
for t in test_kernels test_ops parity; do built $t; done
for t in test_kernels test_ops; do counts "$t" "$qemu" "$work/$t"; done
for case in tests/golden/*/; do
    for isa in best plain; do counts "parity ${case%/} $isa" "$qemu" "$work/parity" "${case%/}" --isa $isa; done
done
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
