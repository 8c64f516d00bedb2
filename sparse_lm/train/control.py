"""The budget controller: holds the forward FLOPs, at the fraction of open gates, at a target."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from ml_collections import ConfigDict

from sparse_lm.core.errors import unknown
from sparse_lm.core.ranges import traced

Array = jax.Array

CONTROLLERS = ('dual', 'quadratic')
DECAY = 0.9  # of the moving average of the measured fraction


class Control(struct.PyTreeNode):
  """The controller's state.

  Attributes:
    price: float32, nats per fraction of the dense twin's FLOPs; 0 without dual ascent.
    measured: float32, moving average of that fraction.
  """

  price: Array
  measured: Array


@dataclasses.dataclass(frozen=True)
class Budget:
  """`config.budget`.

  quadratic  loss + weight * (fraction - target)^2: close to the target, never quite at it.
  dual       the same + price * (fraction - target), with price += rate * (measured - target) after
             each step: the augmented Lagrangian (as in CoFi, Xia et al. 2022). The price
             may fall below zero, which opens gates that have closed too far; without the quadratic
             term it oscillates around the target.

  Attributes:
    target: fraction of the dense twin's forward FLOPs, 1 = no controller.
    controller: 'dual' or 'quadratic'.
    weight: of the quadratic term, in nats.
    rate: of the price's ascent, in nats a step.
  """

  target: float = traced()
  controller: str
  weight: float = traced()
  rate: float = traced()

  @classmethod
  def from_config(cls, config: ConfigDict) -> 'Budget | None':
    """Reads `config.budget`; `None` where there is nothing to hold. Raises UserError."""
    budget = cls(**config.budget)
    if budget.controller not in CONTROLLERS:
      raise unknown('config.budget.controller', budget.controller, CONTROLLERS)
    return budget if budget.target < 1 else None

  def init(self) -> Control:
    """Nothing has a price yet, and everything runs."""
    return Control(price=jnp.float32(0), measured=jnp.float32(1))

  def penalty(self, control: Control, fraction: Array) -> Array:
    """What is added to the loss for running `fraction`."""
    excess = fraction - self.target
    return control.price * excess + self.weight * excess**2

  def price(self, control: Control, fraction: Array) -> Array:
    """The penalty's slope at `fraction`: what a little more of it costs."""
    return control.price + 2 * self.weight * (fraction - self.target)

  def update(self, control: Control, fraction: Array) -> Control:
    """The state after a step that ran `fraction`."""
    measured = DECAY * control.measured + (1 - DECAY) * fraction
    rate = self.rate if self.controller == 'dual' else 0.0
    return Control(control.price + rate * (measured - self.target), measured)
