"""Initialises a model, runs one training step and exits, so that a study can time a whole process.

`python -m experiments.first_step '{"config": ..., "overrides": {...}, "vocab": ...}'` prints a JSON
object after the step. Its `peak_memory` is the peak of the device's allocator in bytes, or null if the
device does not report it.
"""

import json
import sys

import jax
import numpy as np

from sparse_lm.runs import configs, runtime
from sparse_lm.runs.build import build


def main() -> None:
  """Runs one step on random tokens."""
  asked = json.loads(sys.argv[1])
  runtime.prepare()
  config = configs.load(asked['config'], asked['overrides'])
  program, target = build(config, asked['vocab'])
  shape = (config.data.batch, config.data.context + 1)
  tokens = np.random.default_rng(0).integers(0, asked['vocab'], shape).astype(np.int32)
  state, metrics = program.step(0)(program.begin(config.seed, target, shape), tokens, None)
  jax.block_until_ready((state, metrics))
  stats = jax.local_devices()[0].memory_stats() or {}
  print(json.dumps({'peak_memory': stats.get('peak_bytes_in_use')}), flush=True)


if __name__ == '__main__':
  main()
