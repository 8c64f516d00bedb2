"""The base class of layer methods, and the traits that each method declares."""

import dataclasses
from collections.abc import Callable

import jax

from sparse_lm.layers.draws import RandomModule
from sparse_lm.layers.tokens import Tokens
from sparse_lm.plan.cost import Gating

# A layer that a stack method runs: `(tokens, mode) -> residual stream [B, L, D] after the layer`.
Run = Callable[[Tokens, str], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
  """The traits of a layer method. A misspelt trait raises a `TypeError`.

  Attributes:
    paper: authors and year of the paper that introduced the method.
    saves: the computation that the method avoids, or 'nothing'.
    twin: name of the slot's dense method, with which costs are compared; '' if the method is itself
      dense.
    gating: which fraction of the gated computation runs; `None` if the method gates nothing. An
      activation with a gating keeps some hidden units of each token and sets the others to zero.
    reach: the most keys that a query reads, up to and including its own; `None` means all.
    decodes: whether the method can decode. Its decision for a token must then depend on no later token.
    non_causal: modes in which the method reads later tokens.
    couples: modes in which a sequence's outputs depend on the other sequences of the batch.
    policy: whether the method samples actions that are trained by rewards.
    fixed: whether the decision is the same for every input, so that packing can remove closed units.
    splits: for a stack method, whether it passes only the residual stream between layers in evaluation.
      Then the first layers can run alone, and the others later.
    scans: for a stack method, the modes in which it runs every layer exactly once and passes only the
      residual stream on. Then one of its `layers` may be a scan over several layers.
  """

  paper: str
  saves: str
  twin: str = ''
  gating: Gating | None = None
  reach: int | None = None
  decodes: bool = True
  non_causal: tuple[str, ...] = ()
  couples: tuple[str, ...] = ()
  policy: bool = False
  fixed: bool = False
  splits: bool = False
  scans: tuple[str, ...] = ()


class LayerMethod(RandomModule):
  """The base class of the methods of all layer slots.

  Each method is one file in the slot's folder and defines one subclass. A field with a default is a
  config key; the default of a number is given with its range (`core.ranges.ranged`). Fields without a
  default are set by the model: `spec`; `activation`, a constructor of the activation slot's module; and
  `inner`, a constructor of the wrapped method.
  """

  @property
  def traits(self) -> Traits:
    """The method's traits. They depend only on its fields and are read from an unbound module."""
    raise NotImplementedError(type(self).__name__)

  def check(self) -> None:
    """Raises a UserError if fields do not fit each other or the model. Called before compilation."""
