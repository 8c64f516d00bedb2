"""FLOPs per token of a model's passes, in evaluation and in training, and of its dense twin's."""

import dataclasses
import functools

import jax

from sparse_lm.core import tree
from sparse_lm.core.tree import Tree
from sparse_lm.model import lm, plans
from sparse_lm.model.lm import LM
from sparse_lm.plan import cost
from sparse_lm.weights import parts
from sparse_lm.weights.method import WeightMethod

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class PassCosts:
  """The costs of a model over its whole context, read from traces when they are first asked for.

  Attributes:
    method: of the weights; it says which densities are learned.
  """

  model: LM
  method: WeightMethod

  @functools.cached_property
  def ledger(self) -> cost.Ledger:
    """Every matmul of a forward pass in evaluation."""
    return plans.ledger(self.model, self.model.spec.context)

  @functools.cached_property
  def dense_ledger(self) -> cost.Ledger:
    """Every matmul of a forward pass of the dense twin."""
    return plans.ledger(lm.dense_twin(self.model), self.model.spec.context)

  @functools.cached_property
  def dense(self) -> float:
    """Forward FLOPs of the dense twin."""
    return cost.forward_flops(self.dense_ledger, {})

  @functools.cached_property
  def training_ledger(self) -> cost.Ledger:
    """Every matmul of a training step's forward pass.

    One rule holds for all gates, learned, random or top-k: a training step computes what they close and
    multiplies it by zero, so nothing is left out for them. Routers of fixed capacity gather tokens, and
    what they leave out is not in the ledger.
    """
    return cost.ungated(plans.ledger(self.model, self.model.spec.context, mode='train'))

  @functools.cached_property
  def forward_passes(self) -> float:
    """Forward passes of a training step; a part of one where a part is computed again."""
    # A sampled policy's baseline is a second forward pass, without draws.
    return 1 + lm.has_policy(self.model) + plans.recomputed(self.model, self.model.spec.context)

  def training_pass(self, density: Tree) -> float | Array:
    """FLOPs of a training step's forward pass, kernels at the `density` of that step.

    A density that is learned is a gate on weights, and gates leave nothing out.
    """
    charged_density = {
      path: fraction
      for path, fraction in tree.named(density).items()
      if not parts.learns_density(self.method, path)
    }
    return cost.forward_flops(self.training_ledger, charged_density)

  def training_step(self, forward: float, weight_gradient: float | None) -> float:
    """FLOPs of a training step, without a teacher's.

    Args:
      forward: of its forward pass.
      weight_gradient: of the gradient of the weights, `None` = as many as of the forward pass.
    """
    return cost.training_flops(forward, weight_gradient, self.forward_passes)

  def fraction(self, density: Tree, activity: dict[str, Array]) -> Array:
    """Forward FLOPs over the dense twin's: kernels at `density`, gates as they sowed `activity`."""
    measured = cost.open_fractions(self.ledger, activity)
    return cost.forward_flops(self.ledger, tree.named(density), measured) / self.dense
