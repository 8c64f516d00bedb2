"""The FLOPs that training has spent.

They are summed step by step and saved in checkpoints. A run that starts from a checkpoint inherits them.
"""

import dataclasses

from sparse_lm.train.step import Program
from sparse_lm.weights import parts


@dataclasses.dataclass(frozen=True)
class Work:
  """Training FLOPs of a run.

  Attributes:
    own: FLOPs of the run's own steps.
    ancestors: FLOPs of the run that it started from, and of all runs before that.
  """

  own: float = 0.0
  ancestors: float = 0.0

  @property
  def total(self) -> float:
    """FLOPs of the run and all of its ancestors."""
    return self.own + self.ancestors

  def plus(self, flops: float) -> 'Work':
    """Returns the work after one more step of the run."""
    return Work(self.own + flops, self.ancestors)

  def over(self, tokens: int) -> 'Work':
    """Returns the FLOPs per token, given the number of tokens."""
    return Work(self.own / tokens, self.ancestors / tokens)


@dataclasses.dataclass(frozen=True)
class Meter:
  """Computes the FLOPs of a run's steps.

  Attributes:
    program: the run's program.
    tokens: number of tokens per step.
    teacher: FLOPs per token of the teacher's forward pass; 0 without a teacher.
    target: final densities of the prunable leaves, by path.
  """

  program: Program
  tokens: int
  teacher: float
  target: dict[str, float]

  def at_start(self) -> float:
    """Returns the FLOPs of the batches for pruning before step 0."""
    batches = parts.batches_at_start(self.program.method)
    if not batches:
      return 0.0
    return batches * self.tokens * (self.program.start_flops(self.target) + self.teacher)

  def step(self, step: int, forward: float) -> float:
    """Returns the FLOPs of optimizer step `step`, given the FLOPs per token of its forward pass."""
    return self.tokens * (self.program.step_flops(step, forward, self.target) + self.teacher)
