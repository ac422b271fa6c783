"""One of several processes that train a head together; see test_processes.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from cache_schema.features import open_cache
from heads.train import train
from heads.train_config import TrainConfig

if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    cache = open_cache(*(Path(path) for path in asked["stores"]))
    config = TrainConfig(**{**asked["config"], "target_size": tuple(asked["config"]["target_size"])})
    training = train(config, cache, Path(asked["run_dir"]))
    print(json.dumps(training.to_dict()))
    torch.distributed.destroy_process_group()
