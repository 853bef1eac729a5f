#!/bin/sh
# test_quickstart.sh - the quickstart's answers to bad input, its files, and that zero steps change nothing.
#
#   sh tests/test_quickstart.sh [FOLDER]       FOLDER: where quickstart and tiny_model were built; else build/
#
# It runs on the model of tiny_model.c, with random weights, so that a whole run takes seconds.  The last line is
# `N passed, N failed, N skipped`; exit status 1 if something failed.

CDPATH=''
root=$(cd -- "$(dirname -- "$0")/.." && pwd) || exit 1
build=${1:-$root/build}
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
passed=0 failed=0 skipped=0

ok()   { passed=$((passed + 1)); }
bad()  { failed=$((failed + 1)); echo "FAIL test_quickstart: $*"; }
skip() { skipped=$((skipped + 1)); echo "SKIPPED test_quickstart: $*"; }

# check NAME COMMAND...: the command must succeed.
check() { name=$1; shift; if "$@" >"$work/log" 2>&1; then ok; else bad "$name: $(tail -n 1 "$work/log")"; fi; }

# refuse NAME PATTERN ARGUMENTS...: status 1, one line on stderr that PATTERN matches, no win rate, no page.
refuse() {
    name=$1 pattern=$2
    shift 2
    "$build/quickstart" "$@" >"$work/out" 2>"$work/err"
    status=$?
    if [ $status = 1 ] && [ "$(wc -l <"$work/err")" -eq 1 ] && grep -q -e "$pattern" "$work/err" &&
       ! grep -q '^win rate' "$work/out" && [ ! -e "$work/o/quickstart.html" ]; then ok
    else bad "$name: status $status, said: $(cat "$work/err")"; fi
}

mkdir -p "$build" "$work/o"
for source in tests/tiny_model.c examples/quickstart.c; do
    name=$(basename $source .c)
    [ -x "$build/$name" ] || ( cd "$root" && ${CC:-cc} -O2 $source -o "$build/$name" -lm -lpthread ) || exit 1
done
"$build/tiny_model" "$work/model" || exit 1

# ---- Bad input: one clear line -------------------------------------------------------------------------------------

refuse 'unknown judge'  'choose warm, soft or compact'  --model "$work/model" --out "$work/o" --judge blue
refuse 'unknown option' 'unknown option --juge'         --juge warm
refuse 'no value'       '--seed: a value is missing'    --seed
refuse 'steps, letters' '--steps wants a whole number'  --steps ten
refuse 'steps, minus'   '--steps wants a whole number'  --steps -1
refuse 'unknown isa'    'plain, avx2 or avx512'         --isa sse
refuse 'no model'       "$work/nowhere"                 --model "$work/nowhere" --out "$work/o"
refuse 'out is a file'  'quickstart-out'                --model "$work/model" --out "$work/model/model_index.json"

# spoil NAME PATTERN FILE COMMAND: a copy of the model, in which COMMAND made a new FILE out of the old one.
spoil() {
    rm -rf "$work/spoiled"
    cp -R "$work/model" "$work/spoiled"
    sh -c "$4" <"$work/model/$3" >"$work/spoiled/$3"
    refuse "$1" "$2" --model "$work/spoiled" --out "$work/o"
}
spoil 'no weights'      'diffusion_pytorch_model' unet/diffusion_pytorch_model.safetensors 'head -c 0'
spoil 'short weights'   'diffusion_pytorch_model' unet/diffusion_pytorch_model.safetensors 'head -c 5000'
spoil 'no captions'     '9 captions, 528 are'     captions.jsonl 'head -n 9'
spoil 'torn captions'   'captions.jsonl'          captions.jsonl 'head -c 999'
spoil 'equal captions'  '1 captions, '            captions.jsonl "sed 's/<[0-9]*>/<1>/'"

rm "$work/spoiled/captions.jsonl"
refuse 'captions missing' 'captions.jsonl: No such file' --model "$work/spoiled" --out "$work/o"

# ---- Disks that take nothing ---------------------------------------------------------------------------------------

# A limit on file sizes stands in for a full disk: 512 bytes are not enough for prompts.jsonl.  It needs no root.
( trap '' XFSZ; ulimit -f 1; "$build/quickstart" --model "$work/model" --out "$work/o" ) >"$work/out" 2>"$work/err"
if [ $? = 1 ] && [ "$(wc -l <"$work/err")" -eq 1 ] && grep -q 'cannot write' "$work/err" && [ ! -e "$work/o/quickstart.html" ]; then ok
else bad "full disk: $(cat "$work/err")"; fi
if find "$work/o" -name '*.tmp*' | grep -q .; then bad 'full disk: a temporary file was left'; else ok; fi

# Nobody may make folders in /sys, not even root.
if [ -d /sys/kernel ]; then refuse 'read-only folder' '/sys/quickstart-out' --model "$work/model" --out /sys
else skip 'read-only folder: there is no /sys here'; fi

# ---- Whole runs ----------------------------------------------------------------------------------------------------

last_line='^win rate [01]\.[0-9][0-9] (95% CI [01]\.[0-9][0-9]-[01]\.[0-9][0-9]) over 128 held-out prompts, judge [a-z]*, [0-9]* s$'

run() { "$build/quickstart" --model "$work/model" "$@" >"$work/out" 2>"$work/err" && tail -n 1 "$work/out" | grep -q "$last_line"; }

check 'zero steps'       run --steps 0 --out "$work/zero" --judge compact
check 'zero steps: half' grep -q '^win rate 0.50 (95% CI 0.4[0-9]-0.5[0-9])' "$work/out"
check 'zero steps: nothing learned' cmp "$work/zero/quickstart-out/base_127_1.png" "$work/zero/quickstart-out/aligned_127_1.png"

check 'three steps'     run --steps 3 --out "$work/three" --threads 1
check 'again'           run --steps 3 --out "$work/again" --threads 2
check 'the same bits'   diff -r "$work/three/quickstart-out" "$work/again/quickstart-out"
check 'other seed'      run --steps 3 --out "$work/other" --seed 2
check 'other pictures'  sh -c '! cmp -s "$0/three/quickstart-out/base_000_0.png" "$0/other/quickstart-out/base_000_0.png"' "$work"

# ---- What lies in the folder ---------------------------------------------------------------------------------------

out=$work/three/quickstart-out
count() { [ "$(eval "$1" | wc -l)" -eq "$2" ]; }

check 'pictures before' count "ls '$out'/base_*.png" 256
check 'pictures after'  count "ls '$out'/aligned_*.png" 256
check 'prompts'         count "grep '\"split\": \"eval\"' '$out/prompts.jsonl'" 128
check 'prompts once'    count "sort '$out/prompts.jsonl' | cut -d, -f1 | uniq -d" 0
check 'adapters'        test -s "$out/adapter.safetensors"
check 'all pairs there' sh -c 'grep -o "pair_[0-9]*_[01].png" "$0/pairs.jsonl" | while read -r p; do test -s "$0/$p" || exit 1; done' "$out"
check 'page: whole'     sh -c 'tail -n 1 "$0" | grep -q "^</body></html>$"' "$work/three/quickstart.html"
check 'page: pictures'  count "grep -o '<img' '$work/three/quickstart.html'" 512
check 'page: alone'     sh -c '! grep -q "https\{0,1\}://\|<script\|<link" "$0"' "$work/three/quickstart.html"
check 'page: escaped'   sh -c 'grep -q "thing &lt;[0-9]*> &amp; &quot;more&quot;" "$0" && ! grep -q "thing <" "$0"' "$work/three/quickstart.html"

echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
