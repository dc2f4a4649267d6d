"""Answers the same questions with several seeds, and gives the mean of their scores and its spread.

    python -m tools.seeds MODEL=out/dift RUNS=3 TEMPERATURE=0.7 TOP_P=0.9
    torchrun --nproc_per_node=2 -m tools.seeds MODEL=out/dift RUNS=3

All constants of evaluate.py can be set here as well. The runs have SEED, SEED + 1 ... and are in OUT/seed_0,
OUT/seed_1 ... as evaluate.py would write them, picture and page aside; those are in OUT, with summary.json,
the mean. The same command goes on where it was stopped.
"""

import dataclasses

import evaluate
from lib.command_line import override_constants, require
from lib.distributed import end_distributed, init_distributed
from lib.files import write_json
from lib.scores import average_over_seeds
from model import load_model

RUNS = 3  # >= 2; seeds: SEED, SEED + 1 ...
TEMPERATURE = 0.7  # 0 or 0.01 to 100; above 0, as greedy answers are alike (release)
TOP_P = 0.9  # > 0, <= 1; share of the probability that is sampled from (release)

if __name__ == "__main__":
    c = override_constants(globals(), base=vars(evaluate))
    # the seed also chooses the videos, orders, noise and latents of some controls
    runs_differ = c.TEMPERATURE > 0 or c.VIDEO in ("other", "shuffled") or c.LATENTS in ("noise", "swap")
    require(runs_differ, f"RUNS={c.RUNS} needs a TEMPERATURE above 0, as greedy answers are alike.")
    rank, world, device = init_distributed()
    rows = evaluate.load_questions(c, rank, world)
    model = load_model(c.MODEL, device, suffix=c.SUFFIX, fast=c.FAST, seconds_per_pair=c.SECONDS_PER_PAIR)
    out = evaluate.output_folder(c, "eval" if c.BENCH == "toy" else c.BENCH)
    settings = evaluate.to_settings({name.lower(): value for name, value in vars(c).items()})

    summaries = []
    for seed in range(c.SEED, c.SEED + c.RUNS):
        of_seed = dataclasses.replace(settings, seed=seed)
        folder = out / f"seed_{seed}"
        summary = evaluate.evaluate(model, rows, folder, of_seed, c.LIMIT, c.RESUME, rank, world)
        summaries.append(summary)
    if rank == 0:
        summary = average_over_seeds(summaries)
        write_json(out / "summary.json", summary)
        evaluate.report(c, model, rows, out, summary)
    end_distributed()
