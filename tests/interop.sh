#!/bin/sh
# interop.sh - do diffusers, transformers and peft load what the project writes, and the project what they write?
#
#   sh tests/interop.sh [--install]
#
# Needs Python with torch, diffusers, transformers, peft, safetensors: $PYTHON, else that of build/interop-venv, else
# python3.  --install makes build/interop-venv with pip (1 GB or so).  Skipped, and counted so, where they cannot be
# imported.  The last line is the sum: N passed, N failed, N skipped.
cd "$(dirname "$0")/.." || exit 1
work=build/interop-work
mkdir -p build
rm -rf $work
mkdir -p $work
venv=build/interop-venv
if [ "${1:-}" = --install ] && [ ! -x $venv/bin/python ]; then
    python3 -m venv $venv && $venv/bin/pip install -q torch diffusers transformers peft safetensors accelerate ||
        echo "interop.sh: could not make $venv"
fi
python=${PYTHON:-python3}
[ -n "${PYTHON:-}" ] || [ ! -x $venv/bin/python ] || python=$venv/bin/python
if ! "$python" -c 'import torch, diffusers, transformers, peft, safetensors' 2>$work/why.txt; then
    echo "SKIPPED interop: $python cannot import torch, diffusers, transformers, peft: $(tail -n 1 $work/why.txt)"
    echo "SKIPPED interop: set PYTHON, or run sh tests/interop.sh --install"
    echo "0 passed, 0 failed, 1 skipped"
    exit 0
fi
if [ ! -x build/interop ] || [ ! -x build/convert ]; then
    for p in tests/interop examples/convert; do
        ${CC:-cc} ${CFLAGS:--O1} $p.c -o build/"$(basename $p)" -lm -lpthread || { echo "0 passed, 1 failed"; exit 1; }
    done
fi
exec "$python" tests/interop.py $work
