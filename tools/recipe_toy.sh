#!/usr/bin/env bash
# The toy from data to 4DRL: imagery and its controls, three seeds, and the means over them.
#
#     bash tools/recipe_toy.sh             # everything: some hours on two cores
#     TRIAL=1 bash tools/recipe_toy.sh     # does it run at all? A minute or two, into out/trial
#
# SEEDS and ROOT can be set in the environment, and so can further constants of each stage:
#     DIFT_OPTIONS="STEPS=500" SEEDS="0 1" ROOT=out/short bash tools/recipe_toy.sh
# A script that was stopped continues when it is started again: what is finished is not done twice.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "${TRIAL:-0}" = 1 ]; then
    ROOT=${ROOT:-out/trial}
    SEEDS=${SEEDS:-0}
    DATA_OPTIONS=${DATA_OPTIONS:-TRAIN_CLIPS=60 TEST_CLIPS=60 RL_TRAIN_CLIPS=20 RL_TEST_CLIPS=10}
    DIFT_OPTIONS=${DIFT_OPTIONS:-STEPS=10 TEST_ROWS=8}
    EVAL_OPTIONS=${EVAL_OPTIONS:-LIMIT=8 MAX_NEW=32}
    RL_OPTIONS=${RL_OPTIONS:-STEPS=1 GLOBAL_BATCH=4 MAX_NEW=32 HOLDOUT_ROWS=4}
fi
ROOT=${ROOT:-out}                # folder of all results
SEEDS=${SEEDS:-0 1 2}            # of the order of the data; the base model is the same
DATA_OPTIONS=${DATA_OPTIONS:-}   # further constants of generate_data.py
DIFT_OPTIONS=${DIFT_OPTIONS:-}   # of dift.py
EVAL_OPTIONS=${EVAL_OPTIONS:-}   # of evaluate.py
RL_OPTIONS=${RL_OPTIONS:-}       # of grpo4d.py

# the folders <name>_<seed><rest> of all seeds, with commas between them
of_seeds() {
    local folders=""
    for seed in $SEEDS; do folders="$folders,$ROOT/$1_$seed${2:-}"; done
    echo "${folders#,}"
}

# 1. Data: clips of the toy world, questions, and chains of thought with and without imagery.
python generate_data.py OUT=$ROOT/toy $DATA_OPTIONS

# 2. DIFT with imagery, and the control to beat: the same text without imagery. Each run ends with its scores.
for seed in $SEEDS; do
    torchrun dift.py DATA=$ROOT/toy SEED=$seed OUT=$ROOT/dift_$seed $DIFT_OPTIONS
    torchrun dift.py DATA=$ROOT/toy SEED=$seed OUT=$ROOT/noimage_$seed COT=noimage $DIFT_OPTIONS
done

# 3. Controls: does the answer need the imagery? On the first seed: other imagery, and does it need the video?
first=${SEEDS%% *}
for seed in $SEEDS; do
    for latents in zero swap; do
        python evaluate.py MODEL=$ROOT/dift_$seed DATA=$ROOT/toy LATENTS=$latents $EVAL_OPTIONS
    done
done
for control in LATENTS=noise LATENTS=oracle VIDEO=none VIDEO=other VIDEO=shuffled; do
    python evaluate.py MODEL=$ROOT/dift_$first DATA=$ROOT/toy $control $EVAL_OPTIONS
done

# 4. 4DRL from the first seed's model, with held-out scores before and after.
runs=""
for seed in $SEEDS; do
    torchrun grpo4d.py MODEL=$ROOT/dift_$first DATA=$ROOT/toy/rl_train.jsonl HOLDOUT=$ROOT/toy/rl_test.jsonl \
        SINGLES=$ROOT/toy/test_imagery.jsonl SEED=$seed OUT=$ROOT/grpo4d_$seed $RL_OPTIONS
    runs="$runs $ROOT/grpo4d_$seed"
done
python -m tools.mean_of_seeds RUNS="$runs"

# 5. DIFT in tables: right answers by subtask with imagery, without it, and with the controls.
runs="imagery=$(of_seeds dift /eval) noimage=$(of_seeds noimage /eval)"
runs="$runs zero=$(of_seeds dift /eval_latents-zero) swap=$(of_seeds dift /eval_latents-swap)"
python -m tools.compare_runs RUNS="$runs"
runs="imagery=$ROOT/dift_$first/eval"
for control in latents-noise latents-oracle video-none video-other video-shuffled; do
    runs="$runs $control=$ROOT/dift_$first/eval_$control"
done
python -m tools.compare_runs RUNS="$runs"
