"""The FLOPs that training has spent: added up as steps run, kept in checkpoints, handed on to what starts
from them."""

import dataclasses

from sparse_lm.train.step import Program
from sparse_lm.weights import parts


@dataclasses.dataclass(frozen=True)
class Work:
  """FLOPs of training.

  Attributes:
    own: spent by the steps of a run.
    ancestors: spent by the runs whose weights it started from, and by theirs.
  """

  own: float = 0.0
  ancestors: float = 0.0

  @property
  def total(self) -> float:
    """All that led to the weights."""
    return self.own + self.ancestors

  def plus(self, flops: float) -> 'Work':
    """The work after one more step of the run."""
    return Work(self.own + flops, self.ancestors)

  def over(self, tokens: int) -> 'Work':
    """FLOPs for each of so many tokens."""
    return Work(self.own / tokens, self.ancestors / tokens)


@dataclasses.dataclass(frozen=True)
class Meter:
  """What the steps of a run execute.

  Attributes:
    tokens: of a step.
    teacher: FLOPs per token of the teacher's forward pass, 0 without one.
    target: final densities of the prunable leaves, by path.
  """

  program: Program
  tokens: int
  teacher: float
  target: dict[str, float]

  def at_start(self) -> float:
    """FLOPs of the batches that are read before step 0."""
    batches = parts.batches_at_start(self.program.method)
    if not batches:
      return 0.0
    return batches * self.tokens * (self.program.start_flops(self.target) + self.teacher)

  def step(self, step: int, forward: float) -> float:
    """FLOPs of optimizer step `step`, whose forward pass took `forward` FLOPs per token."""
    return self.tokens * (self.program.step_flops(step, forward, self.target) + self.teacher)
