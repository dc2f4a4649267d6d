#!/usr/bin/env bash
# Qwen2.5-VL-3B from real video to a benchmark's score, on eight GPUs, with the constants of the authors' release.
#
# THIS SCRIPT HAS NOT BEEN RUN HERE: no GPU, no weights and no videos of this size were available. Its stages are
# tested on small random networks. Memory by prediction, per device: 11 GiB for DIFT, 29 GiB for 4DRL; see
# docs/large_models.md, and docs/data.md for the files that are read.
#
#     BASE=models/Qwen2.5-VL-3B-Instruct SPATIALVID=data/SpatialVID bash tools/recipe_qwen2_5_vl_3b.sh
#
# Other numbers of GPUs: change --nproc_per_node; 1, 2, 4 or 8 give the same run. A script that was stopped
# continues when it is started again.
set -euo pipefail
cd "$(dirname "$0")/.."

BASE=${BASE:-models/Qwen2.5-VL-3B-Instruct}        # folder of the base model, as it was downloaded
SPATIALVID=${SPATIALVID:-data/SpatialVID}          # videos, annotations, and mask images masks_static/, masks_dynamic/
BENCHMARK=${BENCHMARK:-data/dsr/benchmark.parquet} # DSR-Bench's questions (needs pip install pyarrow)
BENCHMARK_VIDEOS=${BENCHMARK_VIDEOS:-data/dsr/bmk_video} # its videos, <videoID>.mp4
OUT=${OUT:-out}                                    # folder of all results

# 1. Data: labels from geometry, masks from files. SEGMENTER=sam3 ANNOTATOR=api instead needs SAM3 and an endpoint.
python generate_data.py SOURCE=spatialvid SEGMENTER=files MAX_SIDE=640 ALPHA=0.4 VIDEOS="$SPATIALVID" OUT="$OUT/real"

# 2. DIFT: text and imagery. STEPS times GLOBAL_BATCH rows are seen; set STEPS for the size of your data.
torchrun --nproc_per_node=8 dift.py MODEL="$BASE" DATA="$OUT/real" OUT="$OUT/dift_3b" PARALLEL=fsdp \
    K=4 POOLING=strips LR=1e-5 WARMUP=10 BETA2=0.999 W_CE=0.1 W_SIM=1.0 STEPS=5000 GLOBAL_BATCH=8 MICRO_BATCH=1 \
    TEST_BATCH=8 CHECKPOINTING=True CACHE_FEATURES=False

# 3. 4DRL: the same questions, answered by the model itself; scored on held-out questions before and after.
torchrun --nproc_per_node=8 grpo4d.py MODEL="$OUT/dift_3b" DATA="$OUT/real/train_imagery.jsonl" HOLDOUT="" \
    SINGLES="$OUT/real/test_imagery.jsonl" OUT="$OUT/grpo4d_3b" PARALLEL=fsdp LR=1e-6 BETA=0.01 STEPS=400 \
    GLOBAL_BATCH=8 MAX_NEW=1024 MICRO_BATCH=1 ROLLOUT_BATCH=1 TEST_BATCH=8 PREFIX=rows CHECKPOINTING=True \
    CACHE_FEATURES=False

# 4. Score: DSR-Bench, by the strict rule and by the release's.
python evaluate.py MODEL="$OUT/grpo4d_3b" BENCH=dsr DATA="$BENCHMARK" VIDEOS="$BENCHMARK_VIDEOS" OUT="$OUT/dsr" BATCH=8
