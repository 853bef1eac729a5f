#!/bin/sh
# growth.sh - how time grows with resolution, batch and threads, as a table for the README.
#
#   sh tests/growth.sh [WORK] [TYPE]      sd15_forward bf16, if not given; some minutes, best on a quiet machine
#
# Needs build/bench (sh tests/run.sh --build).
cd "$(dirname "$0")/.." || exit 1
work=${1:-sd15_forward} type=${2:-bf16}
seconds() { build/bench "$work" --dtype "$type" --repeat 2 "$@" | sed -n 's/.*"seconds": \([0-9.]*\),.*/\1/p'; }
row() { printf '| %s |' "$1"; shift; for f in "$@"; do printf ' %s |' "$(seconds $f)"; done; echo; }
if [ ! -x build/bench ]; then echo "growth.sh: build/bench is not there: sh tests/run.sh --build"; exit 1; fi
grep -m 1 '^model name' /proc/cpuinfo 2>/dev/null | sed 's/.*: //'
echo "$work, $type, $(date +%Y-%m-%d), seconds a step"
case $work in small*) sizes="16 32 48 64" batches="2 4 8 16" ;; *) sizes="32 48 64 96" batches="2 4" ;; esac
echo "| side | time |"
echo "| --- | --- |"
for n in $sizes; do row "$n" "--size $n"; done
echo "| batch | time |"
echo "| --- | --- |"
for n in $batches; do row "$n" "--batch $n"; done
echo "| threads | time |"
echo "| --- | --- |"
n=1
while [ $n -le "$(nproc)" ]; do row $n "--threads $n"; n=$((n * 2)); done
