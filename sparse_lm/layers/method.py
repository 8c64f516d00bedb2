"""What every method of a layer slot is, and what it declares about itself."""

import dataclasses
from collections.abc import Callable

import jax

from sparse_lm.layers.draws import Drawing
from sparse_lm.layers.tokens import Tokens
from sparse_lm.plan.cost import Gating

# What a stack method runs: `(tokens, mode) -> the residual stream [B, L, D] after the layer`.
Run = Callable[[Tokens, str], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
  """What a layer method declares. An unknown keyword fails here, so nothing is misspelt in silence.

  Attributes:
    paper: who introduced the method, and where.
    saves: what is not computed because of it, or 'nothing'.
    twin: name of the slot's dense method, which costs are compared with; '' of a method that is dense.
    gating: the part of the work behind the method that runs, or `None` where all of it does. An
      activation with a gating keeps some hidden units of each token and zeroes the others.
    reach: how many keys behind and including its own a query reads at most, or `None` for all.
    decodes: whether decoding can run it: its decisions must be one token's own.
    non_causal: modes in which it reads later tokens.
    couples: modes in which other sequences of the batch change what it computes.
    policy: whether it samples actions that are trained by their reward.
    fixed: whether its decision is the same for every input, so that packing can remove what it closes.
    splits: of a stack method, whether in evaluation it carries nothing but the residual stream: then the
      first layers may run by themselves, and the others later.
    scans: of a stack method, the modes in which it runs every layer once and only passes the residual
      stream from one layer to the next. One of the `layers` that it gets may then run several as a scan.
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


class LayerMethod(Drawing):
  """The base class of all methods of the layer slots.

  A method is one file in the slot's folder and defines one subclass. A field with a default is a config
  key, and a number states its range there (`core.ranges.ranged`). A field without a default is supplied
  by whoever builds the method: `spec`, `activation`, or `inner`, which makes the method that runs inside.
  """

  @property
  def traits(self) -> Traits:
    """What the method declares, from its fields alone: it is read without any parameters."""
    raise NotImplementedError(type(self).__name__)

  def check(self) -> None:
    """Raises UserError where fields do not fit each other or the model, before anything is compiled."""
