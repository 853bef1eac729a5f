#!/bin/sh
# winrate.sh - the emoji model, trained by examples/train on the quickstart's pairs: adapters and all weights, by each
# form of the loss.  By name alone: it takes seven minutes on two cores.
#
#   sh tests/winrate.sh [FOLDER]           FOLDER: where results go, build/winrate-out
root=$(cd -- "$(dirname -- "$0")/.." && pwd) || exit 1
cd "$root" || exit 1
out=${1:-build/winrate-out}
mkdir -p "$out"
for p in tests/winrate.c examples/train.c; do
    n=build/$(basename $p .c)
    [ -x "$n" ] || ${CC:-cc} -O2 $p -o "$n" -lm -lpthread || exit 1
done
[ -s "$out/quickstart-out/pairs.jsonl" ] || build/winrate pairs "$out" || exit 1
passed=0 failed=0
layers=to_q,to_k,to_v,to_out.0,proj_in,proj_out,ff.net.0.proj,ff.net.2,time_emb_proj
for how in lora full; do
    for loss in sigmoid hinge ipo mapo; do
        name=$how-$loss
        if [ $how = lora ]; then set -- --rank 16 --lora_target_modules $layers --learning_rate 5e-4
        else set -- --rank 0 --learning_rate 1e-4; fi
        [ $loss = ipo ] && set -- "$@" --beta_dpo 1000
        if [ $loss = mapo ]; then set -- "$@" --objective mapo; else set -- "$@" --loss_type $loss; fi
        build/train --pretrained_model_name_or_path examples/emoji --train_data_dir "$out/quickstart-out/pairs.jsonl" \
            --output_dir "$out/$name" --preset small --max_train_steps 90 --train_batch_size 16 --seed 1 --no_hflip \
            --validation_pairs 0.05 --validation_steps 30 --checkpointing_steps 0 "$@" >"$out/$name.txt" 2>&1 ||
            { cat "$out/$name.txt"; failed=$((failed + 1)); continue; }
        result=$out/$name/model
        [ $how = lora ] && result=$out/$name/adapter.safetensors
        line=$(build/winrate rate "$out" "$result" | tail -n 1)
        echo "$line"
        low=$(echo "$line" | sed -n 's/.*CI \([0-9.]*\)-.*/\1/p')
        if [ -n "$low" ] && [ "$(echo "$low" | awk '{ print ($1 > 0.75) }')" = 1 ]; then passed=$((passed + 1))
        else failed=$((failed + 1)); fi
    done
done
echo "$passed passed, $failed failed"
[ $failed = 0 ]
