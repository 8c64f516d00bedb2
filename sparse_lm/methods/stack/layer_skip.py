"""Layer dropout that grows with depth, and early exits that learn to predict (LayerSkip)."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sparse_lm.core.errors import require
from sparse_lm.core.ranges import layer_slice, ranged
from sparse_lm.layers.method import LayerMethod, Run, Traits
from sparse_lm.layers.progress import Progress
from sparse_lm.layers.sow import Exit, sow
from sparse_lm.layers.spec import Spec
from sparse_lm.layers.tokens import Tokens


class LayerSkip(LayerMethod):
  """Drops layers at random in training, and also trains the head on the output of earlier layers.

  At step t of T, layer l of L is dropped for a sequence with the probability
  `dropout * S(t) * (exp(l ln 2 / (L - 1)) - 1)`.
  Dropped layers are computed and charged, because each sequence of a batch drops other layers. The head
  also predicts from the residual stream after some earlier layers, the exits. The loss is the weighted
  mean of all losses: an exit's loss has the weight `scale`, and the last layer's loss has the weight 1.
  With each step every exit moves to the next layer, and from the last layer to the first. An exit at the
  last layer has the weight 0, because the last layer always predicts. Training is charged one pass of
  the head for each exit.

  Evaluation runs the plain stack. The method improves what the first layers predict by themselves, which
  self-speculative decoding uses for its drafts. The weights of the losses follow the port in torchtune.

  Attributes:
    dropout: probability of dropping the last layer, at the end of the run.
    grows: True lets layer dropout grow over the run, S(t) = exp(t ln 2 / (T - 1)) - 1, as training from
      scratch needs it; False keeps S = 1, to continue a trained model.
    exits: a slice of the layers that are exits at the first step.
    scale: weight of the loss of an exit.
  """

  spec: Spec
  dropout: float = ranged(0.1, '[0, 1)')
  grows: bool = True
  exits: str = '::2'
  scale: float = ranged(0.2, '[0, inf)')

  @property
  def traits(self) -> Traits:
    """The traits of the method."""
    return Traits(
      paper='LayerSkip (Elhoushi et al. 2024)',
      saves='in self-speculative decoding, a pass of the later layers for each accepted draft',
      twin='sequential',
      splits=True,
      scans=('eval',),  # training drops single layers and learns from the stream between them
    )

  def check(self) -> None:
    """Raises UserError for exits that no layer has, or a head that also reads the tokens."""
    valid = 'False: the table is looked up by tokens, and exits have the residual stream alone'
    require(not self.spec.bigram, 'config.model.bigram', self.spec.bigram, valid)
    layer_slice('config.stack.exits', self.exits, self.spec.layers)

  def __call__(self, layers: Sequence[Run], tokens: Tokens, mode: str) -> jax.Array:
    """Returns the residual stream `[B, L, D]` after the last layer; see `Sequential`."""
    x_BxLxD, streams, trains = tokens.x, [], mode == 'train'
    kept_NxB = self._kept(len(layers), tokens) if trains and self.dropout else None
    for layer, run in enumerate(layers):
      after_BxLxD = run(tokens.replace(x=x_BxLxD), mode)
      if kept_NxB is not None:
        after_BxLxD = jnp.where(kept_NxB[layer, :, None, None], after_BxLxD, x_BxLxD)
      x_BxLxD = after_BxLxD
      streams.append(x_BxLxD)
    if trains:
      self._sow_exits(streams, tokens.progress)
    return x_BxLxD

  def _kept(self, layers: int, tokens: Tokens) -> jax.Array:
    """Draws which layers run for each sequence, bool `[N, B]`."""
    late_N = jnp.exp(jnp.arange(layers) * math.log(2) / max(layers - 1, 1)) - 1
    grown = 1.0
    if self.grows and tokens.progress is not None:
      grown = jnp.exp(tokens.progress.fraction * math.log(2)) - 1
    shape = layers, len(tokens.x)
    dropped_N = self.dropout * grown * late_N
    return jax.random.bernoulli(self.make_rng('dropout'), 1 - dropped_N[:, None], shape)

  def _sow_exits(self, streams: Sequence[jax.Array], progress: Progress | None) -> None:
    count, step = len(streams), 0 if progress is None else progress.step
    first_E = jnp.array(layer_slice('config.stack.exits', self.exits, count))
    layer_E = (first_E + step) % count
    weight_E = jnp.where(layer_E == count - 1, 0.0, self.scale)
    chosen_ExBxLxD = jnp.stack(streams)[layer_E]
    for i, weight in enumerate(weight_E):
      sow(self, 'exits', str(i), Exit(chosen_ExBxLxD[i], weight))
