"""The part of a checkpoint besides the training state: what the log needs to continue unchanged."""

import dataclasses

from sparse_lm.core.records import JsonObject
from sparse_lm.core.tree import Tree
from sparse_lm.train.work import Work


@dataclasses.dataclass
class History:
  """Saved with each checkpoint; the loop keeps it up to date.

  Attributes:
    masks: at the last evaluation, or at step 0 before the first; like the parameters, bool, `None` =
      dense. The next evaluation counts the bits that differ from them.
    planned_steps: optimizer steps that the schedules of the learning rate and of the weight method
      span.
    work: FLOPs that training has spent.
    loss_sum: of the training losses (nats per token) of the steps since the last line of the log.
    loss_steps: the number of these steps.
  """

  masks: Tree
  planned_steps: int
  work: Work
  loss_sum: float = 0.0
  loss_steps: int = 0

  def add_loss(self, loss: float) -> None:
    """Counts one more step."""
    self.loss_sum += loss
    self.loss_steps += 1

  def take_mean_loss(self) -> float:
    """The mean over the steps since the last call, in nats per token."""
    mean = self.loss_sum / self.loss_steps
    self.loss_sum, self.loss_steps = 0.0, 0
    return mean

  def numbers(self) -> JsonObject:
    """All fields but the masks, as JSON values."""
    fields = {field: value for field, value in vars(self).items() if field != 'masks'}
    return fields | {'work': dataclasses.asdict(self.work)}

  def restore(self, numbers: JsonObject, masks: Tree) -> None:
    """Sets all fields to what a checkpoint holds."""
    vars(self).update(numbers, work=Work(**numbers['work']), masks=masks)
