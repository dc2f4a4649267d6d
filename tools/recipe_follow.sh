#!/usr/bin/env bash
# Look-alikes that change places: questions that need imagery. Data, DIFT, its controls, a sheet of what is imagined.
#
#     SEEDS=0 bash tools/recipe_follow.sh     # about an hour on two cores
#     bash tools/recipe_follow.sh             # three seeds, and their means
#     TRIAL=1 bash tools/recipe_follow.sh     # does it run at all? A minute or two, into out/trial
#
# A script that was stopped continues when it is started again: what is finished is not done twice.
set -euo pipefail
cd "$(dirname "$0")/.."

ROOT=${ROOT:-out}
SEEDS=${SEEDS:-0 1 2}
DATA_OPTIONS="P_FOLLOW=1.0 TRAIN_CLIPS=3500 TEST_CLIPS=150 RL_TRAIN_CLIPS=10 RL_TEST_CLIPS=10"
DIFT_OPTIONS="STEPS=3000 W_SIM=5 W_SIM_END=5"
EVAL_OPTIONS=""
if [ "${TRIAL:-0}" = 1 ]; then
    ROOT=out/trial
    SEEDS=0
    DATA_OPTIONS="P_FOLLOW=1.0 TRAIN_CLIPS=40 TEST_CLIPS=24 RL_TRAIN_CLIPS=4 RL_TEST_CLIPS=2"
    DIFT_OPTIONS="STEPS=6 TEST_ROWS=8 WARMUP=2"
    EVAL_OPTIONS="LIMIT=8 MAX_NEW=64"
fi
data=$ROOT/follow

# the folders <name>_<seed><rest> of all seeds, with commas between them
of_seeds() {
    local folders=""
    for seed in $SEEDS; do folders="$folders,$ROOT/$1_$seed${2:-}"; done
    echo "${folders#,}"
}

python generate_data.py OUT=$data $DATA_OPTIONS

# With imagery, and four controls: the same text without it, places in words for it, a block's delimiters alone,
# and pads for latents.
for seed in $SEEDS; do
    options="DATA=$data SEED=$seed $DIFT_OPTIONS"
    torchrun dift.py OUT=$ROOT/follow_imagery_$seed $options
    torchrun dift.py OUT=$ROOT/follow_noimage_$seed COT=noimage $options
    torchrun dift.py OUT=$ROOT/follow_verbal_$seed COT=verbal $options
    torchrun dift.py OUT=$ROOT/follow_markers_$seed IMAGERY=markers $options
    torchrun dift.py OUT=$ROOT/follow_pause_$seed IMAGERY=pause $options
    # Does the answer hang on what is imagined?
    for latents in zero swap; do
        python evaluate.py MODEL=$ROOT/follow_imagery_$seed DATA=$data LATENTS=$latents $EVAL_OPTIONS
    done
done

kinds=""
for kind in imagery noimage verbal markers pause; do
    kinds="$kinds $kind=$(of_seeds follow_$kind /eval)"
done
python -m tools.compare_runs RUNS="$kinds"
if [ "${TRIAL:-0}" != 1 ]; then  # a trial scores these on fewer questions
    kinds="imagery=$(of_seeds follow_imagery /eval)"
    for latents in zero swap; do
        kinds="$kinds $latents=$(of_seeds follow_imagery /eval_latents-$latents)"
    done
    python -m tools.compare_runs RUNS="$kinds"
fi
first=${SEEDS%% *}
python -m tools.imagined MODEL=$ROOT/follow_imagery_$first DATA=$data N=20 OUT=$ROOT/imagined.png
