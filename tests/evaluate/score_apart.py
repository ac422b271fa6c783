"""One of several processes that evaluate heads together; see test_evaluation.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed

from cache_schema.features import open_cache
from evaluate import split_scores
from evaluate.evaluation import evaluate_runs

if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    split_scores.BATCH_SIZE = asked["batch_size"]
    cache = open_cache(*(Path(path) for path in asked["stores"]))
    results = evaluate_runs([Path(asked["run_dir"])], cache, Path(asked["out"]), split=asked["split"])
    print(json.dumps(results))
    torch.distributed.destroy_process_group()  # one that is still there when Python ends may abort the process
