"""Our side as a worker: ``python -m benchmarks.worker NAME MODEL_DIR DATA_FILE``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from benchmarks.ours import stepper
from benchmarks.protocol import Channel, serve, versions


def main(name: str, model_dir: str, data_file: str) -> None:
    """Load, then run one step per request."""
    channel = Channel()
    data = json.loads(Path(data_file).read_text())
    step = stepper(name, Path(model_dir), data)
    serve(channel, step, threads=torch.get_num_threads(), **versions("torch", "transformers"))


if __name__ == "__main__":
    main(*sys.argv[1:])
