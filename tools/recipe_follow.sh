#!/usr/bin/env bash
# Look-alikes that change places: questions that need imagery. Data, DIFT, its controls, a sheet of what is imagined.
#
#     bash tools/recipe_follow.sh             # about an hour on two cores
#     TRIAL=1 bash tools/recipe_follow.sh     # does it run at all? A minute or two, into out/trial
#
# A script that was stopped continues when it is started again: what is finished is not done twice.
set -euo pipefail
cd "$(dirname "$0")/.."

ROOT=${ROOT:-out}
DATA_OPTIONS="P_FOLLOW=1.0 TRAIN_CLIPS=3500 TEST_CLIPS=150 RL_TRAIN_CLIPS=10 RL_TEST_CLIPS=10"
DIFT_OPTIONS="STEPS=3000 W_SIM=5"
EVAL_OPTIONS=""
if [ "${TRIAL:-0}" = 1 ]; then
    ROOT=out/trial
    DATA_OPTIONS="P_FOLLOW=1.0 TRAIN_CLIPS=40 TEST_CLIPS=24 RL_TRAIN_CLIPS=4 RL_TEST_CLIPS=2"
    DIFT_OPTIONS="STEPS=6 TEST_ROWS=8 WARMUP=2"
    EVAL_OPTIONS="LIMIT=8 MAX_NEW=64"
fi
data=$ROOT/follow

python generate_data.py OUT=$data $DATA_OPTIONS

# With imagery, and three controls: the same text without it, a block's delimiters alone, pads for latents.
torchrun dift.py DATA=$data OUT=$ROOT/dift_follow $DIFT_OPTIONS
torchrun dift.py DATA=$data OUT=$ROOT/follow_noimage COT=noimage $DIFT_OPTIONS
torchrun dift.py DATA=$data OUT=$ROOT/follow_markers IMAGERY=markers $DIFT_OPTIONS
torchrun dift.py DATA=$data OUT=$ROOT/follow_pause IMAGERY=pause $DIFT_OPTIONS

# Does the answer hang on what is imagined?
for latents in zero swap oracle; do
    python evaluate.py MODEL=$ROOT/dift_follow DATA=$data LATENTS=$latents $EVAL_OPTIONS
done
python -m tools.imagined MODEL=$ROOT/dift_follow DATA=$data N=20 OUT=$ROOT/imagined.png
