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

# 1. Data: clips of the toy world, questions, and chains of thought with and without imagery.
python generate_data.py OUT=$ROOT/toy $DATA_OPTIONS

# 2. DIFT with imagery, and the control to beat: the same text without imagery. Each run ends with its scores.
for seed in $SEEDS; do
    torchrun dift.py DATA=$ROOT/toy SEED=$seed OUT=$ROOT/dift_$seed $DIFT_OPTIONS
    torchrun dift.py DATA=$ROOT/toy SEED=$seed OUT=$ROOT/noimage_$seed COT=noimage $DIFT_OPTIONS
done

# 3. Controls on the first seed: does the answer need the imagery, and does it need the video?
first=${SEEDS%% *}
for latents in zero noise swap oracle; do
    python evaluate.py MODEL=$ROOT/dift_$first DATA=$ROOT/toy LATENTS=$latents $EVAL_OPTIONS
done
for video in none other shuffled; do
    python evaluate.py MODEL=$ROOT/dift_$first DATA=$ROOT/toy VIDEO=$video $EVAL_OPTIONS
done

# 4. 4DRL from the first seed's model, with held-out scores before and after.
runs=""
for seed in $SEEDS; do
    torchrun grpo4d.py MODEL=$ROOT/dift_$first DATA=$ROOT/toy/rl_train.jsonl HOLDOUT=$ROOT/toy/rl_test.jsonl \
        SINGLES=$ROOT/toy/test_imagery.jsonl SEED=$seed OUT=$ROOT/grpo4d_$seed $RL_OPTIONS
    runs="$runs $ROOT/grpo4d_$seed"
done
python -m tools.mean_of_seeds RUNS="$runs"

# 5. DIFT in one table: right answers of all questions, with imagery and without, and the controls.
python - $ROOT <<'END'
import json
import sys
from pathlib import Path

of_kind = {}
for file in sorted(Path(sys.argv[1]).glob("*_*/eval*/summary.json")):
    score = json.loads(file.read_text())["scores"]["micro"]
    print(f"{str(file.parent):40} {score['accuracy']:6.1%} of {score['n']}")
    if file.parent.name == "eval":
        of_kind.setdefault(file.parts[-3].rpartition("_")[0], []).append(score["accuracy"])
for kind, scores in of_kind.items():
    print(f"{kind}: mean of {len(scores)} seeds {sum(scores) / len(scores):.1%}")
END
