"""The budget controller: keeps the forward FLOPs of learned gates at a target."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from ml_collections import ConfigDict

from sparse_lm.core.errors import unknown
from sparse_lm.core.ranges import traced

Array = jax.Array

CONTROLLERS = ('dual', 'quadratic')
DECAY = 0.9  # decay of the moving average of the measured fraction


class Control(struct.PyTreeNode):
  """The controller's state.

  Attributes:
    price: float32, the Lagrange multiplier, in nats per unit of `measured`; 0 for 'quadratic'.
    measured: float32, moving average of the forward FLOPs as a fraction of the dense twin's.
  """

  price: Array
  measured: Array


@dataclasses.dataclass(frozen=True)
class Budget:
  """The fields of `config.budget`.

  - `quadratic` adds `weight * (fraction - target)^2` to the loss. The fraction comes close to the
    target but does not reach it exactly.
  - `dual` also adds `price * (fraction - target)`, with `price += rate * (measured - target)` after
    each step. This is the augmented Lagrangian, as in CoFi (Xia et al. 2022). A negative price opens
    gates that have closed too far. Without the quadratic term, the fraction would oscillate.

  Attributes:
    target: forward FLOPs as a fraction of the dense twin's; 1 means no controller.
    controller: 'dual' or 'quadratic'.
    weight: weight of the quadratic term, in nats.
    rate: step size of the price, in nats per step.
  """

  target: float = traced()
  controller: str
  weight: float = traced()
  rate: float = traced()

  @classmethod
  def from_config(cls, config: ConfigDict) -> 'Budget | None':
    """Reads `config.budget`; returns `None` without a budget. Raises a UserError for bad fields."""
    budget = cls(**config.budget)
    if budget.controller not in CONTROLLERS:
      raise unknown('config.budget.controller', budget.controller, CONTROLLERS)
    return budget if budget.target < 1 else None

  def init(self) -> Control:
    """Returns the initial state: price 0, and all gates open."""
    return Control(price=jnp.float32(0), measured=jnp.float32(1))

  def penalty(self, control: Control, fraction: Array) -> Array:
    """Returns the term that is added to the loss, given the fraction of FLOPs."""
    excess = fraction - self.target
    return control.price * excess + self.weight * excess**2

  def price(self, control: Control, fraction: Array) -> Array:
    """Returns the derivative of `penalty` with respect to `fraction`."""
    return control.price + 2 * self.weight * (fraction - self.target)

  def update(self, control: Control, fraction: Array) -> Control:
    """Returns the state after a step with this fraction of FLOPs."""
    measured = DECAY * control.measured + (1 - DECAY) * fraction
    rate = self.rate if self.controller == 'dual' else 0.0
    return Control(control.price + rate * (measured - self.target), measured)
