"""FLOPs per token of a model and its dense twin, in evaluation and in training."""

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
  """The costs of a model over its whole context; computed by tracing on first use.

  Attributes:
    model: the model.
    method: the weight method, which declares which densities are learned.
  """

  model: LM
  method: WeightMethod

  @functools.cached_property
  def ledger(self) -> cost.Ledger:
    """The ledger of a forward pass in evaluation."""
    return plans.ledger(self.model, self.model.spec.context)

  @functools.cached_property
  def dense_ledger(self) -> cost.Ledger:
    """The ledger of a forward pass of the dense twin."""
    return plans.ledger(lm.dense_twin(self.model), self.model.spec.context)

  @functools.cached_property
  def dense(self) -> float:
    """Forward FLOPs of the dense twin."""
    return cost.forward_flops(self.dense_ledger, {})

  @functools.cached_property
  def training_ledger(self) -> cost.Ledger:
    """The ledger of a training step's forward pass.

    Closed gates save nothing here, whether learned, random or top-k, because a training step computes
    everything behind them and multiplies it by zero. Routers of fixed capacity do save FLOPs: they gather
    tokens, and the ledger contains only the gathered ones.
    """
    return cost.ungated(plans.ledger(self.model, self.model.spec.context, mode='train'))

  @functools.cached_property
  def forward_passes(self) -> float:
    """Number of forward passes per training step; recomputation adds a fraction."""
    # The baseline of a sampled policy is a second, greedy forward pass.
    return 1 + lm.has_policy(self.model) + plans.recomputed(self.model, self.model.spec.context)

  def training_pass(self, density: Tree) -> float | Array:
    """Returns the FLOPs of a training step's forward pass, with kernels at the step's `density`.

    A learned density is a gate on weights, and gates save nothing in training, so it counts as 1.
    """
    charged_density = {
      path: fraction
      for path, fraction in tree.named(density).items()
      if not parts.learns_density(self.method, path)
    }
    return cost.forward_flops(self.training_ledger, charged_density)

  def training_step(self, forward: float, weight_gradient: float | None) -> float:
    """Returns the FLOPs of a training step, without a teacher.

    Args:
      forward: FLOPs of its forward pass.
      weight_gradient: FLOPs of the weight gradients; `None` means those of the forward pass.
    """
    return cost.training_flops(forward, weight_gradient, self.forward_passes)

  def fraction(self, density: Tree, activity: dict[str, Array]) -> Array:
    """Returns the forward FLOPs as a fraction of the dense twin's.

    Args:
      density: densities of the kernels.
      activity: open fractions of the gates per token, by path.
    """
    measured = cost.open_fractions(self.ledger, activity)
    return cost.forward_flops(self.ledger, tree.named(density), measured) / self.dense
