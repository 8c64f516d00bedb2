"""The budget controller: holds the forward FLOPs that gates let through at a target."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sparse_lm.core.errors import require, unknown

Array = jax.Array

CONTROLLERS = ('dual', 'quadratic')
DECAY = 0.9  # of the moving average of the measured fraction


class Control(struct.PyTreeNode):
  """The controller's state.

  Attributes:
    price: float32, loss per fraction of the dense twin's FLOPs (dual ascent only).
    measured: float32, moving average of that fraction.
  """

  price: Array
  measured: Array


@dataclasses.dataclass(frozen=True)
class Budget:
  """`config.budget`.

  dual       loss + price * fraction, and price += rate * (measured - target) after each step
             (as the Lagrangian of CoFi, Xia et al. 2022). Differs from the paper: no quadratic term;
             and the price may fall below zero, which opens gates that have closed too far.
  quadratic  loss + rate * (fraction - target)^2: never quite at the target, but without memory.

  Attributes:
    target: fraction of the dense twin's forward FLOPs, 1 = no controller.
  """

  target: float
  controller: str
  rate: float

  @classmethod
  def from_config(cls, config: Any) -> 'Budget | None':
    """Reads `config.budget`; `None` where there is nothing to hold. Raises UserError."""
    budget = cls(**config.budget)
    require(0 < budget.target <= 1, 'config.budget.target', budget.target, 'a fraction in (0, 1]')
    require(budget.rate > 0, 'config.budget.rate', budget.rate, 'a rate above 0')
    if budget.controller not in CONTROLLERS:
      raise unknown('config.budget.controller', budget.controller, CONTROLLERS)
    return budget if budget.target < 1 else None

  def init(self) -> Control:
    """Nothing has a price yet, and everything runs."""
    return Control(price=jnp.float32(0), measured=jnp.float32(1))

  def penalty(self, control: Control, fraction: Array) -> Array:
    """What is added to the loss for running `fraction`."""
    if self.controller == 'dual':
      return control.price * (fraction - self.target)
    return self.rate * (fraction - self.target) ** 2

  def price(self, control: Control, fraction: Array) -> Array:
    """The penalty's slope at `fraction`: what a little more of it costs."""
    if self.controller == 'dual':
      return control.price
    return 2 * self.rate * (fraction - self.target)

  def update(self, control: Control, fraction: Array) -> Control:
    """The state after a step that ran `fraction`."""
    measured = DECAY * control.measured + (1 - DECAY) * fraction
    price = control.price + self.rate * (measured - self.target)
    return Control(price=price, measured=measured)
