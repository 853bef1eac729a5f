#!/bin/sh
# test_sample.sh - the program sample: its answers to bad input, its files, that the same command gives the same bytes.
#
#   sh tests/test_sample.sh [FOLDER]       FOLDER: where sample and tiny_model were built; else build/
#
# It runs on the model of tiny_model.c, with random weights.  The last line is `N passed, N failed, N skipped`; exit
# status 1 if something failed.

CDPATH=''
root=$(cd -- "$(dirname -- "$0")/.." && pwd) || exit 1
build=${1:-$root/build}
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
passed=0 failed=0

ok()  { passed=$((passed + 1)); }
bad() { failed=$((failed + 1)); echo "FAIL test_sample: $*"; }

# works NAME ARGUMENTS...: status 0.
works() {
    name=$1
    shift
    if "$build/sample" "$work/model" "thing 1" --steps 4 "$@" >"$work/out" 2>"$work/err"; then ok
    else bad "$name: $(tail -n 1 "$work/err")"; fi
}

# refuse NAME PATTERN ARGUMENTS...: status 1, one line on stderr that PATTERN matches, no picture.
refuse() {
    name=$1 pattern=$2
    shift 2
    rm -f "$work/no.png"
    "$build/sample" -o "$work/no.png" "$@" >"$work/out" 2>"$work/err"
    status=$?
    if [ $status = 1 ] && [ "$(wc -l <"$work/err")" -eq 1 ] && grep -q -e "$pattern" "$work/err" && [ ! -e "$work/no.png" ]; then ok
    else bad "$name: status $status, said: $(cat "$work/err")"; fi
}

# says NAME FILE TEXT: the file holds the text.
says() { if grep -a -q -F -e "$3" "$2"; then ok; else bad "$1: $2 does not say $3"; fi; }

# equal NAME A B, differ NAME A B
equal()  { if cmp -s "$2" "$3"; then ok; else bad "$1: $2 and $3 differ"; fi; }
differ() { if cmp -s "$2" "$3"; then bad "$1: $2 and $3 are the same"; else ok; fi; }

for source in tests/tiny_model.c examples/sample.c; do
    name=$(basename $source .c)
    [ -x "$build/$name" ] || ( cd "$root" && mkdir -p "$build" && ${CC:-cc} -O2 $source -o "$build/$name" -lm -lpthread ) || exit 1
done
"$build/tiny_model" "$work/model" || exit 1
m=$work/model

# ---- Pictures --------------------------------------------------------------------------------------------------------

works 'one picture'      -o "$work/a.png" --negative "dark, blue" --cfg 3.5 --seed 5 --sampler "DPM++ 2M Karras"
says  'prompt'           "$work/a.png" 'thing 1'
says  'negative prompt'  "$work/a.png" 'Negative prompt: dark, blue'
says  'settings'         "$work/a.png" 'Steps: 4, Sampler: DPM++ 2M Karras, CFG scale: 3.5, Seed: 5, Size: 8x8, Model: model, Version: diffdpo'
works 'again'            -o "$work/b.png" --negative "dark, blue" --cfg 3.5 --seed 5 --sampler dpmpp2m_karras
equal 'again'            "$work/a.png" "$work/b.png"
works 'three at once'    -o "$work/c.png" -n 3 --negative "dark, blue" --cfg 3.5 --seed 4 --sampler dpmpp2m_karras --batch 2
equal 'the second of three is seed 5' "$work/a.png" "$work/c-2.png"
differ 'seeds'           "$work/c-1.png" "$work/c-3.png"
works 'another size'     -o "$work/d.png" --size 12x6
says  'another size'     "$work/d.png" 'Size: 12x6'
works 'start'            -o "$work/e.png" --init "$work/d.png" --strength 0.5
says  'start'            "$work/e.png" 'Size: 11x6, Model: model, Denoising strength: 0.5'
works 'mask'             -o "$work/f.png" --init "$work/a.png" --mask "$work/c-1.png"
works 'refiner'          -o "$work/g.png" --refiner "$m" --refine 0.5 --rescale 0.7
says  'refiner'          "$work/g.png" 'Refiner: model, Refiner switch at: 0.5'
works 'types'            -o "$work/h.png" --dtype bf16
(cd "$work" && "$build/sample" model thing --steps 2 >"$work/out" 2>&1 && [ -s out.png ]) && ok || bad 'out.png in the folder'
[ "$(tail -n 1 "$work/out")" = out.png ] && ok || bad 'the name of the file is not the last line'

# ---- Bad input: one clear line ---------------------------------------------------------------------------------------

refuse 'nothing'         'usage: sample MODEL'
refuse 'no prompt'       'usage: sample MODEL'          "$m"
refuse 'two prompts'     'not also "b"'                 "$m" a b
refuse 'unknown option'  'unknown option --stepps'      "$m" a --stepps 4
refuse 'steps, letters'  '--steps wants a whole number' "$m" a --steps four
refuse 'steps, none'     '--steps wants a whole number' "$m" a --steps 0
refuse 'cfg'             '--cfg wants a number'         "$m" a --cfg nan
refuse 'size'            'WIDTHxHEIGHT'                 "$m" a --size 8
refuse 'size, minus'     'WIDTHxHEIGHT'                 "$m" a --size 8x-8
refuse 'sampler'         'choose from: auto ddim'       "$m" a --sampler heun
refuse 'dtype'           'f32, bf16 or f16'             "$m" a --dtype int8
refuse 'strength alone'  'need --init'                  "$m" a --strength 0.5
refuse 'strength'        '--strength wants a number'    "$m" a --init "$work/a.png" --strength 2
refuse 'too little'      'none is left'                 "$m" a --init "$work/a.png" --strength 0.01
refuse 'no model'        "$work/nowhere"                "$work/nowhere" a
refuse 'no refiner'      "$work/nowhere"                "$m" a --refiner "$work/nowhere"
refuse 'no adapter'      "$work/nowhere"                "$m" a --lora "$work/nowhere:0.5"
refuse 'no picture'      "$work/nowhere.png"            "$m" a --init "$work/nowhere.png"
refuse 'not a picture'   'not an image'                 "$m" a --init "$m/model_index.json"
"$build/sample" "$m" a --steps 1 -o "$work/nowhere/a.png" >"$work/out" 2>"$work/err"
[ $? = 1 ] && grep -q "$work/nowhere" "$work/err" && ok || bad "a folder that is not there: $(cat "$work/err")"

echo "$passed passed, $failed failed, 0 skipped"
[ $failed = 0 ]
