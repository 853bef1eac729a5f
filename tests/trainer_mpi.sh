#!/bin/sh
# trainer_mpi.sh - the same global batch on 1, 2 and 4 processes gives the same training to rounding.  By name alone: it
# needs mpicc and mpirun (apt-get install libopenmpi-dev openmpi-bin).
root=$(cd -- "$(dirname -- "$0")/.." && pwd) || exit 1
build=$root/build
if ! command -v mpicc >/dev/null || ! command -v mpirun >/dev/null; then
    echo "SKIPPED trainer_mpi: no mpicc"
    echo "0 passed, 0 failed, 1 skipped"
    exit 0
fi
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
cd "$root" || exit 1
mpicc -O1 -DDIFFDPO_MPI examples/train.c -o "$build/train-mpi" -lm -lpthread || exit 1
for p in tests/tiny_model.c examples/sample.c; do
    n=$build/$(basename $p .c)
    [ -x "$n" ] || ${CC:-cc} -O2 $p -o "$n" -lm -lpthread || exit 1
done
"$build/tiny_model" "$work/model" && "$build/sample" "$work/model" thing -o "$work/p.png" -n 24 --steps 1 >/dev/null || exit 1
for i in 1 2 3 4 5 6 7 8 9 10 11 12; do
    echo "{\"prompt\": \"thing $i\", \"chosen\": \"p-$i.png\", \"rejected\": \"p-$((i + 12)).png\"}" >>"$work/pairs.jsonl"
done
passed=0 failed=0
for objective in dpo kto full; do
    for n in 1 2 4; do
        # kto's mean is over a micro-batch of all processes: there the batch is cut, for pairs the accumulation
        batch=1 acc=$((4 / n))
        name=$objective rank=2
        [ $objective = kto ] && batch=$((4 / n)) acc=1
        [ $objective = full ] && name=dpo rank=0      # several parcels of gradients: their sums overlap backward
        mpirun --allow-run-as-root --oversubscribe -np $n "$build/train-mpi" --pretrained_model_name_or_path "$work/model" \
            --train_data_dir "$work/pairs.jsonl" --output_dir "$work/$objective-$n" --preset small --max_train_steps 20 --rank $rank --threads 1 \
            --objective $name --beta_dpo 1000 --learning_rate $([ $rank = 0 ] && echo 1e-4 || echo 1e-3) --train_batch_size $batch --gradient_accumulation_steps $acc --no_estimate \
            --validation_pairs 0.2 --validation_steps 10 --checkpointing_steps 10 >"$work/out" 2>&1 || { cat "$work/out"; exit 1; }
    done
    for n in 2 4; do
        # losses and errors of every step, to four digits of the largest
        figures() { sed -n 's/.*"loss": \([^,]*\),.*"policy_w": \([^,]*\), "policy_l": \([^,]*\),.*"grad_norm": \([^,]*\),.*/\1 \2 \3 \4/p' "$1"; }
        figures "$work/$objective-1/metrics.jsonl" >"$work/1"
        figures "$work/$objective-$n/metrics.jsonl" >"$work/2"
        worst=$(paste "$work/1" "$work/2" | awk 'NF != 8 { print 9; exit } { for (k = 1; k <= 4; k++) { d = $k - $(k+4); if (d < 0) d = -d; s = $k < 0 ? -$k : $k; if (s < 0.01) s = 0.01; if (d / s > w) w = d / s } } END { print w + 0 }')
        echo "$objective, $n processes: figures of 20 steps differ by $worst at most"
        if [ "$(wc -l <"$work/1")" = 20 ] && [ "$(echo "$worst" | awk '{ print ($1 < 0.002) }')" = 1 ]; then passed=$((passed + 1))
        else failed=$((failed + 1)); echo "FAIL trainer_mpi: $objective on $n processes"; fi
    done
done
echo "$passed passed, $failed failed, 0 skipped"
[ $failed = 0 ]
