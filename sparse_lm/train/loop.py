"""The training loop."""

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from sparse_lm.core import rng
from sparse_lm.core.errors import UserError
from sparse_lm.train import observe
from sparse_lm.train import state as states
from sparse_lm.train.checkpoint import Checkpoints
from sparse_lm.train.evaluate import named_losses, result_of, scalars
from sparse_lm.train.setup import Setup, setup
from sparse_lm.train.state import TrainState
from sparse_lm.train.workdir import Workdir


def train(config: ConfigDict, workdir: str, progress: bool = True) -> dict[str, Any]:
  """Trains what `config` describes, or continues it, and returns the contents of result.json.

  Args:
    config: from `core.config.load`.
    workdir: folder of the run; one that holds a finished run is not trained again.
    progress: whether to show a bar on stderr.

  Raises:
    UserError: bad input, before anything is written; or a loss that is no longer finite, with the
      last good checkpoint named.
    SystemExit: SIGTERM or Ctrl-C, after the state has been saved.
  """
  run = setup(config)
  folder = Workdir(workdir, config, run.data)
  if finished := folder.result(config.train.steps):
    return finished
  folder.open()
  checkpoints = Checkpoints(folder.path)
  try:
    return _Loop(run, folder, checkpoints, progress).run()
  finally:
    checkpoints.close()
    folder.close()


class _Stop:
  """Notes SIGTERM and Ctrl-C while a run is under way, so that it can save first."""

  def __init__(self) -> None:
    self.signum: int | None = None

  def __enter__(self) -> '_Stop':
    self._old = {}
    if threading.current_thread() is threading.main_thread():
      for signum in (signal.SIGTERM, signal.SIGINT):
        self._old[signum] = signal.signal(signum, self._note)
    return self

  def _note(self, signum: int, frame: Any) -> None:
    self.signum = signum

  def __exit__(self, *_: Any) -> None:
    for signum, handler in self._old.items():
      signal.signal(signum, handler)


class _Loop:
  """One run from where it stands to its last step."""

  def __init__(self, run: Setup, folder: Workdir, checkpoints: Checkpoints, progress: bool) -> None:
    self.setup, self.folder, self.checkpoints = run, folder, checkpoints
    self.config, self.program = run.config, run.program
    self.progress = progress
    self.pending: list[tuple[int, dict[str, jax.Array]]] = []
    self.fetched: list[dict[str, float]] = []  # since the last line of the log
    self.clock = time.perf_counter()

  def run(self) -> dict[str, Any]:
    """Trains, logs, evaluates and saves."""
    state, batches = self._start()
    _, self.masks = self.program.finalize(state)
    first, steps = int(state.step), self.config.train.steps
    with _Stop() as stop, self._bar(first, steps) as bar:
      for step in range(first, steps):
        tokens = next(batches)
        state, metrics = self.program.step(step)(state, tokens, self._taught(tokens))
        done = step + 1
        self.pending.append((done, metrics))
        bar.update()
        if stop.signum or done % self.config.train.log_every == 0 or done == steps:
          self._log(bar, done)
        if done % self.config.train.eval_every == 0 and done < steps:
          self._evaluate(state, done)
        if stop.signum or done % self.config.train.checkpoint_every == 0 or done == steps:
          self._save(state, batches)
        if stop.signum:
          self._leave(stop.signum, done)
    return self._finish(state)

  def _start(self) -> tuple[TrainState, Iterator[np.ndarray]]:
    """The state and the data where the newest checkpoint left them, or at step 0."""
    state = self.setup.start()
    batches = self.setup.data.train_iterator(rng.data_seed(self.config.seed))
    restored = self.checkpoints.restore(state, batches)
    if restored is None:
      self.folder.resume_metrics(0)
      return state, batches
    self.checkpoints.set_aside_after(int(restored.step))
    self.folder.resume_metrics(int(restored.step))
    return restored, batches

  def _taught(self, tokens_BxL1: np.ndarray) -> jax.Array | None:
    """The teacher's logits, if there is one."""
    teacher = self.setup.teacher
    return None if teacher is None else teacher.logits(tokens_BxL1[:, :-1])

  def _bar(self, first: int, steps: int) -> tqdm:
    return tqdm(
      total=steps,
      initial=first,
      disable=not self.progress,
      unit='step',
      desc=self.folder.path.name[-40:],
      dynamic_ncols=True,
      file=sys.stderr,
    )

  def _fetch(self) -> None:
    """Brings the steps since the last call to the host and refuses what is not finite."""
    for step, metrics in self.pending:
      fetched = scalars(jax.device_get(metrics))
      for name in ('loss', 'gradient_norm'):
        self._check_finite(name, fetched[name], step)
      self.fetched.append(fetched)
    self.pending = []

  def _log(self, bar: tqdm, step: int) -> None:
    """Logs the newest step, with the mean loss and the speed since the last call."""
    self._fetch()
    now = time.perf_counter()
    seconds, self.clock = (now - self.clock) / len(self.fetched), now
    speed = self.config.data.batch * self.config.data.context / seconds
    loss = float(np.mean([metrics['loss'] for metrics in self.fetched]))
    self.folder.log(step, self.fetched[-1] | {'loss': loss, 'tokens_per_second': speed})
    self.fetched = []
    bar.set_postfix_str(f'loss {loss:.3f}, {speed:,.0f} tokens/s')

  def _evaluate(self, state: TrainState, step: int) -> dict[str, float]:
    """Validation loss, and what the connections did since the last evaluation."""
    params, masks = self.program.finalize(state)
    values, self.observed = named_losses(self.setup, params, state.model_state)
    self._check_finite('validation loss', values['val_loss'], step)
    seen = {f'val/{name}': value for name, value in self.observed.items()}
    self.folder.log(step, values | seen | observe.connections(masks, self.masks))
    self.masks = masks
    self.clock = time.perf_counter()
    return values

  def _save(self, state: TrainState, batches: Any) -> None:
    """Never saves a state whose losses were not seen to be finite, or less sparse than its masks."""
    self._fetch()
    states.check_masks(self.program, state)
    self.checkpoints.save(state, batches)
    self.clock = time.perf_counter()

  def _check_finite(self, name: str, value: float, step: int) -> None:
    if math.isfinite(value):
      return
    steps = self.checkpoints.steps()
    good = f'checkpoint {steps[-1]} in {self.checkpoints.path}' if steps else 'none yet'
    raise UserError(
      f'{name} is {value} at step {step}; nothing was saved from it; last good: {good}; try a lower '
      f'config.optimizer.learning_rate than {self.config.optimizer.learning_rate}'
    )

  def _leave(self, signum: int, step: int) -> None:
    print(f'\nstopped at step {step}, saved; the same command continues', file=sys.stderr)
    raise SystemExit(128 + signum)

  def _finish(self, state: TrainState) -> dict[str, Any]:
    evaluated = self._evaluate(state, int(state.step))
    speeds = self.folder.logged('tokens_per_second')
    # The first interval compiles.
    speed = float(np.median(speeds[1:] or speeds or [math.nan]))
    measured = {'train_step_ms': 1e3 * self.config.data.batch * self.config.data.context / speed}
    result = result_of(self.setup, state, self.masks, evaluated | measured, self.observed)
    self.folder.write_result(result)
    return result
