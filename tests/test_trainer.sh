#!/bin/sh
# test_trainer.sh - the program train: bad input, its files, that a run that is killed again and again ends with the bytes
# of one that was not, and that a full disk leaves the last good checkpoint.
#
#   sh tests/test_trainer.sh [FOLDER]      FOLDER: where train, sample and tiny_model were built; else build/
#
# Environment: KILLS (8) how often a run is killed.  It runs on the model of tiny_model.c and on the small latent one of
# tests/golden.  The last line is `N passed, N failed, N skipped`; exit status 1 if something failed.

CDPATH=''
root=$(cd -- "$(dirname -- "$0")/.." && pwd) || exit 1
build=${1:-$root/build}
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
passed=0 failed=0 skipped=0

ok()   { passed=$((passed + 1)); }
bad()  { failed=$((failed + 1)); echo "FAIL test_trainer: $*"; }

for source in tests/tiny_model.c examples/sample.c examples/train.c; do
    name=$(basename $source .c)
    [ -x "$build/$name" ] || ( cd "$root" && mkdir -p "$build" && ${CC:-cc} -O2 $source -o "$build/$name" -lm -lpthread ) || exit 1
done
"$build/tiny_model" "$work/model" || exit 1
m=$work/model

# Twelve pairs of pictures that the model draws of nothing: in a folder with w/ and l/, and in a manifest.
mkdir "$work/pairs" "$work/pairs/w" "$work/pairs/l"
if ! "$build/sample" "$m" thing -o "$work/p.png" -n 24 --steps 1 --size 16x16 >"$work/out" 2>"$work/err"; then
    echo "SKIPPED test_trainer: no pictures: $(tail -n 1 "$work/err")"
    echo "0 passed, 0 failed, 1 skipped"
    exit 0
fi
for i in 1 10 11 12 2 3 4 5 6 7 8 9; do    # as a folder's names are sorted
    cp "$work/p-$i.png" "$work/pairs/w/$i.png"
    cp "$work/p-$((i + 12)).png" "$work/pairs/l/$i.png"
    echo "thing $i" >"$work/pairs/w/$i.txt"
    echo "{\"prompt\": \"thing $i\", \"chosen\": \"pairs/w/$i.png\", \"rejected\": \"pairs/l/$i.png\"}" >>"$work/pairs.jsonl"
done

# train OUT ARGUMENTS...: a small run.  EXEC=exec: in place of the shell, so that a kill meets the program.
EXEC=
train() {
    folder=$1
    shift
    $EXEC "$build/train" --pretrained_model_name_or_path "$m" --train_data_dir "$work/pairs" --output_dir "$folder" --preset small \
        --max_train_steps 12 --train_batch_size 2 --rank 2 --learning_rate 1e-3 --threads 1 "$@"
}
works()  { name=$1; shift; if train "$@" >"$work/out" 2>"$work/err"; then ok; else bad "$name: $(tail -n 1 "$work/err")"; fi; }
equal()  { if cmp -s "$2" "$3"; then ok; else bad "$1: $2 and $3 differ"; fi; }
differ() { if [ -s "$2" ] && [ -s "$3" ] && ! cmp -s "$2" "$3"; then ok; else bad "$1: $2 and $3 are the same"; fi; }
says()   { if grep -a -q -e "$3" "$2"; then ok; else bad "$1: $2 does not say $3"; fi; }
exists() { if [ -s "$2" ]; then ok; else bad "$1: there is no $2"; fi; }

# refuse NAME PATTERN ARGUMENTS...: status 1, one line on stderr that PATTERN matches, no output folder.
refuse() {
    name=$1 pattern=$2
    shift 2
    rm -rf "$work/no"
    train "$work/no" "$@" >"$work/out" 2>"$work/err"
    status=$?
    if [ $status = 1 ] && [ "$(wc -l <"$work/err")" -eq 1 ] && grep -q -e "$pattern" "$work/err" && [ ! -e "$work/no" ]; then ok
    else bad "$name: status $status, said: $(cat "$work/err"), left: $(ls "$work/no" 2>/dev/null)"; fi
}

# ---- What it writes ---------------------------------------------------------------------------------------------------

works  'a run'      "$work/a" --validation_pairs 0.3 --validation_steps 6 --validation_prompts "thing 1" 'a <b> & "c"' --validation_sampler_steps 2
exists 'adapter'    "$work/a/adapter.safetensors"
exists 'checkpoint' "$work/a/checkpoint-12/state.safetensors"
exists 'best'       "$work/a/best/state.safetensors"
exists 'sample'     "$work/a/samples/step-000006-1-0.png"
exists 'events'     "$work/a/events.out.tfevents.0.diffdpo"
says   'estimate'   "$work/out" '^memory  *[0-9.]* MB'
says   'batch'      "$work/out" '^step  *2 pairs = 2 a batch x 1 accumulated x 1 processes; 12 steps, 8x8 pixels'
says   'beta'       "$work/out" "beta 2000 as the authors write it (diffusers' script for SD: 1000)"
says   'page'       "$work/a/report.html" 'a &lt;b> &amp; &quot;c&quot;'
[ "$(grep -c '"loss"' "$work/a/metrics.jsonl")" = 12 ] && ok || bad 'not a line a step in metrics.jsonl'
if command -v python3 >/dev/null && python3 -c '' 2>/dev/null; then
    python3 "$root/tests/events.py" "$work/a" >"$work/out" 2>&1 && says 'TensorBoard' "$work/out" '^16 events' || bad "TensorBoard: $(cat "$work/out")"
else
    echo 'SKIPPED test_trainer: the TensorBoard file: no python3'
    skipped=$((skipped + 1))
fi
[ "$(grep -c held_accuracy "$work/a/metrics.jsonl")" = 3 ] && ok || bad 'held-out pairs were not measured three times'
"$build/sample" "$m" "thing 1" --lora "$work/a/adapter.safetensors" --steps 1 -o "$work/s.png" >"$work/out" 2>&1 && ok || bad "the adapter: $(cat "$work/out")"
works  'again, from the manifest, by = and -' "$work/b" --validation-pairs=0.3 --train-data-dir="$work/pairs.jsonl" --threads=2
equal  'two threads'     "$work/a/adapter.safetensors" "$work/b/adapter.safetensors"
works  'other objective' "$work/c" --loss_type ipo
works  'all weights'     "$work/f" --rank 0 --learning_rate 1e-5 --use_8bit_adam --use_ema
exists 'a model'         "$work/f/model/unet/diffusion_pytorch_model.safetensors"
works  'objectives: sft' "$work/g" --sft --snr_gamma 5
works  'mapo'            "$work/h" --objective mapo --beta_dpo 0.1
works  'kto'             "$work/i" --objective kto --beta_dpo 1000
works  'kto, weighed'    "$work/i2" --objective kto --beta_dpo 1000 --desirable_weight 3
says   'kto, weighed'    "$work/err" 'weigh 3 times as much as the others; 1 to 1.33 is advised, as with desirable_weight 1.33 or undesirable_weight 2.25'
differ 'kto, weighed'    "$work/i/adapter.safetensors" "$work/i2/adapter.safetensors"
works  'kto, a share'    "$work/i3" --objective kto --beta_dpo 1000 --positive_ratio 0.75
differ 'kto, a share'    "$work/i/adapter.safetensors" "$work/i3/adapter.safetensors"
works  'bf16'            "$work/h1" --mixed_precision bf16
works  'fp16'            "$work/h2" --mixed_precision fp16
says   'fp16'            "$work/out" 'fp16  *is taken as bf16'
equal  'fp16'            "$work/h1/adapter.safetensors" "$work/h2/adapter.safetensors"
works  'buckets'         "$work/j" --enable_bucket --bucket_reso_steps 8 --random_crop --separate_views
train "$work/w" --learning_rate 3 --max_grad_norm 0 --degrading_limit 0.02 --stop_when_degrading >"$work/out" 2>"$work/err" && ok || bad "degrading: $(cat "$work/err")"
says   'degrading'       "$work/err" 'warning: step .*both errors are more than 2% above'
says   'degrading'       "$work/err" 'stopped at step'
m=$root/tests/golden/latents/pipeline
works  'latents'         "$work/l" --resolution 16 --noise_offset 0.1
works  'latents, cached' "$work/k" --resolution 16 --noise_offset 0.1 --cache_dir "$work/l/cache"
works  'no encoders'     "$work/m" --resolution 16 --noise_offset 0.1 --drop_encoders
equal  'no encoders'     "$work/l/adapter.safetensors" "$work/m/adapter.safetensors"
works  'no encoders, all weights' "$work/n" --resolution 16 --drop_encoders --rank 0 --learning_rate 1e-5
exists 'a VAE again'     "$work/n/model/vae/diffusion_pytorch_model.safetensors"
works  'drawn meanwhile' "$work/o" --resolution 16 --noise_offset 0.1 --validation_prompts "thing 1" --validation_steps 6 --validation_sampler_steps 1
equal  'drawn meanwhile' "$work/l/adapter.safetensors" "$work/o/adapter.safetensors"
works  'cropped anywhere' "$work/r" --resolution 16 --random_crop --drop_encoders
works  'and anew'         "$work/q" --resolution 16 --random_crop --cache_dir none
equal  'cropped anywhere' "$work/r/adapter.safetensors" "$work/q/adapter.safetensors"
equal  'latents, cached' "$work/l/adapter.safetensors" "$work/k/adapter.safetensors"
works  'latents, all cached' "$work/s" --resolution 16 --noise_offset 0.1 --cache_dir "$work/l/cache"
says   'latents, all cached' "$work/out" "^0 texts and pictures were encoded, the run's others are in the caches"
m=$work/model
"$build/train" --check_data --train_data_dir "$work/pairs" >"$work/out" 2>"$work/err" && says 'data' "$work/out" '12 pairs' || bad "data: $(cat "$work/err")"
"$build/train" --help >"$work/out" && says 'help' "$work/out" '--beta_dpo N'

# ---- Bad input: one clear line, exit status 1, nothing written --------------------------------------------------------

refuse 'unknown option'  'unknown option --beta_dop; did you mean --beta_dpo' --beta-dop 3
refuse 'no value'        '--seed wants a value'                --seed
refuse 'letters'         '--rank wants a whole number'         --rank four
refuse 'nan'             '--learning_rate wants a number'      --learning_rate nan
refuse 'choice'          'sigmoid|hinge|ipo'                   --loss_type logistic
refuse 'flag'            'takes no value'                      --scale_lr=3
refuse 'not an option'   'not an option: 3'                    3
refuse 'preset'          'there is no preset'                  --preset lora
refuse 'no model'        "$work/nowhere"                       --pretrained_model_name_or_path "$work/nowhere"
refuse 'no pairs'        "$work/nowhere"                       --train_data_dir "$work/nowhere"
refuse 'two objectives'  'contradicts'                         --sft --objective kto
refuse 'two optimizers'  'different optimizers'                --use_adafactor --use_8bit_adam
refuse 'encoders'        'contradicts --keep_encoders'         --drop_encoders --keep_encoders
refuse 'weights of kto'  'about KTO alone'                     --desirable_weight 2
refuse 'two held sets'   'one of the two'                      --validation_pairs 0.1 --validation_data_dir "$work/pairs"
refuse 'smoothing'       'label smoothing'                     --loss_type hinge --label_smoothing 0.1
refuse 'min-SNR'         'min-SNR'                             --snr_gamma 5
refuse 'safeguard'       'safeguard'                           --sft --sdpo_mu 0.5
refuse 'no encoders'     'has no VAE'                          --drop_encoders
refuse 'no such layers'  'no layer of UNet2DConditionModel'    --lora_target_modules to_z
echo x >"$work/file"
refuse 'a file there'    'a file has that name'                --output_dir "$work/file"
: >"$work/empty.jsonl"
refuse 'empty data'      'no pairs in it'                      --train_data_dir "$work/empty.jsonl"
refuse 'resolution'      '--resolution wants'                  --resolution big
refuse 'no checkpoint'   "$work/nowhere"                       --resume_from_checkpoint "$work/nowhere"
cp "$work/pairs.jsonl" "$work/broken.jsonl"
echo '{"prompt": "x", "chosen": "pairs/w/1.png", "rejected": "nowhere.png"}' >>"$work/broken.jsonl"
refuse 'a bad row'       'broken.jsonl:13.*nowhere.png'        --train_data_dir "$work/broken.jsonl"
"$build/sample" "$m" thing -o "$work/small.png" --steps 1 --size 6x10 >"$work/out" 2>&1
echo '{"prompt": "x", "chosen": "pairs/w/1.png", "rejected": "small.png"}' >"$work/sizes.jsonl"
refuse 'different sizes' 'sizes.jsonl:1: pictures of different sizes, 16x16 and 6x10' --train_data_dir "$work/sizes.jsonl"
head -c 60 "$work/pairs/w/1.png" >"$work/cut.png"
echo '{"prompt": "x", "chosen": "cut.png", "rejected": "cut.png"}' >"$work/cut.jsonl"
train "$work/cut" --train_data_dir "$work/cut.jsonl" >"$work/out" 2>"$work/err"
[ $? = 1 ] && [ "$(wc -l <"$work/err")" -eq 1 ] && grep -q 'cut.jsonl:1' "$work/err" && ok || bad "an unreadable picture: $(cat "$work/err")"

# ---- Going on ---------------------------------------------------------------------------------------------------------

# figures FILE: metrics without what time does to them.
figures() { sed 's/, "bytes".*//; s/, "time".*//' "$1"; }
long() { folder=$1; shift; train "$folder" --max_train_steps 60 --checkpointing_steps 4 --checkpoints_total_limit 3 --validation_pairs 0.3 \
         --validation_steps 10 --validation_prompts "thing 1" --validation_sampler_steps 1 --no_estimate --resume_from_checkpoint latest "$@"; }
long "$work/whole" >"$work/out" 2>"$work/err" || bad "a long run: $(cat "$work/err")"
kills=0 tries=0
while [ $kills -lt "${KILLS:-8}" ] && [ $tries -lt 2000 ]; do
    tries=$((tries + 1))
    # the step at which it dies depends on the machine; a run that ended before is begun anew
    ( EXEC=exec; long "$work/killed" >"$work/out" 2>"$work/err" ) &
    pid=$!
    sleep "0.$(od -An -N2 -tu2 /dev/urandom | awk '{ printf "%03d", 30 + $1 % 500 }')"
    if kill -9 $pid 2>/dev/null; then kills=$((kills + 1)); fi
    wait $pid 2>/dev/null
    if grep -q report.html "$work/out"; then
        cmp -s "$work/whole/checkpoint-60/state.safetensors" "$work/killed/checkpoint-60/state.safetensors" || bad "killed $kills times: other weights"
        mv "$work/killed" "$work/killed-$tries"
        rm -rf "$work/killed-$tries"
    fi
done
if long "$work/killed" >"$work/out" 2>"$work/err"; then ok; else bad "after $kills kills: $(cat "$work/err")"; fi
equal 'killed: state'   "$work/whole/checkpoint-60/state.safetensors" "$work/killed/checkpoint-60/state.safetensors"
equal 'killed: adapter' "$work/whole/adapter.safetensors" "$work/killed/adapter.safetensors"
equal 'killed: best'    "$work/whole/best/state.safetensors" "$work/killed/best/state.safetensors"
equal 'killed: sample'  "$work/whole/samples/step-000060-0-0.png" "$work/killed/samples/step-000060-0-0.png"
figures "$work/whole/metrics.jsonl" >"$work/1"
figures "$work/killed/metrics.jsonl" >"$work/2"
equal 'killed: metrics' "$work/1" "$work/2"
[ "$(find "$work/killed" -name '*.part' -o -name '*.gone' | wc -l)" = 0 ] && ok || bad 'what kills left is still there'
[ "$(find "$work/killed" -name 'checkpoint-*' | wc -l)" = 3 ] && ok || bad 'not three checkpoints'

refused_resume() {
    name=$1 pattern=$2
    shift 2
    long "$work/killed" "$@" >"$work/out" 2>"$work/err"
    status=$?
    if [ $status = 1 ] && [ "$(wc -l <"$work/err")" -eq 1 ] && grep -q -e "$pattern" "$work/err"; then ok
    else bad "$name: status $status, said: $(cat "$work/err")"; fi
}
head -n 11 "$work/pairs.jsonl" >"$work/fewer.jsonl"
refused_resume 'another beta'  'was made with --beta_dpo 2000, not 5'  --beta_dpo 5
refused_resume 'another seed'  'was made with --seed 0, not 3'         --seed 3
refused_resume 'another model' 'another run'                           --pretrained_model_name_or_path "$root/tests/golden/pixels/pipeline"
refused_resume 'other pairs'   'its data is'                           --train_data_dir "$work/fewer.jsonl"
equal 'refused: nothing changed' "$work/whole/checkpoint-60/state.safetensors" "$work/killed/checkpoint-60/state.safetensors"

# A limit on file sizes stands in for a full disk: the last good checkpoint stays, and the run can go on from it.
train "$work/full" --checkpointing_steps 4 --max_train_steps 4 --cache_dir none >"$work/out" 2>"$work/err" || bad "$(cat "$work/err")"
( trap '' XFSZ; ulimit -f 8; train "$work/full" --checkpointing_steps 4 --max_train_steps 12 --cache_dir none --resume_from_checkpoint latest ) >"$work/out" 2>"$work/err"
[ $? = 1 ] && [ "$(wc -l <"$work/err")" -eq 1 ] && grep -q 'cannot write' "$work/err" && ok || bad "full disk: $(cat "$work/err")"
[ "$(cat "$work/full/latest.txt")" = checkpoint-4 ] && ok || bad "full disk: latest.txt says $(cat "$work/full/latest.txt")"
works 'after the full disk' "$work/full" --checkpointing_steps 4 --cache_dir none --resume_from_checkpoint latest
works 'without it'          "$work/space" --checkpointing_steps 4 --cache_dir none
equal 'after the full disk' "$work/full/adapter.safetensors" "$work/space/adapter.safetensors"

echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
