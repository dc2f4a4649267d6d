#!/usr/bin/env bash
# 4DRL finds out when to imagine: look-alikes, half of DIFT's rows with imagery and half without. Then questions and
# keys alone, with a format reward that does not ask for imagery. The control has never learned to imagine.
#
#     SEEDS=0 bash tools/recipe_when_to_imagine.sh     # about an hour and a half on two cores
#     bash tools/recipe_when_to_imagine.sh             # three seeds
#     TRIAL=1 bash tools/recipe_when_to_imagine.sh     # does it run at all? A minute or two, into out/trial
#
# A script that was stopped continues when it is started again: what is finished is not done twice.
set -euo pipefail
cd "$(dirname "$0")/.."

ROOT=${ROOT:-out}
SEEDS=${SEEDS:-0 1 2}
DATA_OPTIONS="P_FOLLOW=1.0 TRAIN_CLIPS=3500 TEST_CLIPS=150 RL_TRAIN_CLIPS=1000 RL_TEST_CLIPS=300 RL_EXCHANGES=(1,4)"
ONCE_OPTIONS="P_FOLLOW=1.0 TRAIN_CLIPS=1 TEST_CLIPS=100 RL_TRAIN_CLIPS=1 RL_TEST_CLIPS=1 EXCHANGES=(1,1) SEED=1"
DIFT_OPTIONS="STEPS=6000 W_SIM=5 W_SIM_END=5"
RL_OPTIONS="STEPS=40 GLOBAL_BATCH=24 HOLDOUT_ROWS=400"
EVAL_OPTIONS=""
if [ "${TRIAL:-0}" = 1 ]; then
    ROOT=out/trial
    SEEDS=0
    DATA_OPTIONS="P_FOLLOW=1.0 TRAIN_CLIPS=20 TEST_CLIPS=4 RL_TRAIN_CLIPS=8 RL_TEST_CLIPS=4"
    ONCE_OPTIONS="P_FOLLOW=1.0 TRAIN_CLIPS=1 TEST_CLIPS=2 RL_TRAIN_CLIPS=1 RL_TEST_CLIPS=1 EXCHANGES=(1,1) SEED=1"
    DIFT_OPTIONS="STEPS=4 TEST_ROWS=4 WARMUP=2"
    RL_OPTIONS="STEPS=2 GLOBAL_BATCH=2 HOLDOUT_ROWS=4 MAX_NEW=64"
    EVAL_OPTIONS="LIMIT=4 MAX_NEW=64"
fi
data=$ROOT/imagine
once=$ROOT/imagine_once  # look-alikes of which two change places once

# the folders <name>_<seed><rest> of all seeds, with commas between them
of_seeds() {
    local folders=""
    for seed in $SEEDS; do folders="$folders,$ROOT/$1_$seed${2:-}"; done
    echo "${folders#,}"
}

python generate_data.py OUT=$data $DATA_OPTIONS
python generate_data.py OUT=$once $ONCE_OPTIONS
cat $data/train_imagery.jsonl $data/train_noimage.jsonl > $data/half.jsonl
cp $data/test_imagery.jsonl $data/half_test.jsonl

for seed in $SEEDS; do
    torchrun dift.py DATA=$data/half.jsonl OUT=$ROOT/half_$seed SEED=$seed $DIFT_OPTIONS
    torchrun dift.py DATA=$data COT=noimage OUT=$ROOT/never_$seed SEED=$seed $DIFT_OPTIONS
    for model in half never; do
        OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 grpo4d.py MODEL=$ROOT/${model}_$seed OUT=$ROOT/${model}_4drl_$seed \
            DATA=$data/rl_train.jsonl HOLDOUT=$data/rl_test.jsonl SINGLES=$once/test_imagery.jsonl \
            FORMAT_NEEDS_IMAGERY=False SEED=$seed $RL_OPTIONS
    done
    # greedy scores hide how often it imagines: before, the likelier of two starts is always the same
    for model in half_$seed half_4drl_$seed; do
        python evaluate.py MODEL=$ROOT/$model DATA=$data/rl_test.jsonl TEMPERATURE=1.0 \
            OUT=$ROOT/${model}_sampled $EVAL_OPTIONS
    done
done
# means of the seeds: greedy answers to its held-out questions and to those with one exchange, then sampled ones
for kind in compound single; do
    python -m tools.compare_runs RUNS="before=$(of_seeds half_4drl /before/$kind) after=$(of_seeds half_4drl /after/$kind)"
done
python -m tools.compare_runs RUNS="before=$(of_seeds half _sampled) after=$(of_seeds half_4drl _sampled)"
