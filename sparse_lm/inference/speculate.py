"""Self-speculative decoding (LayerSkip, Elhoushi et al. 2024, section 3.3).

The first layers of a model draft several tokens, and the other layers verify them all at once. There is
no second model: for drafts, the head reads the residual stream after the exit layer. The verification
reuses the first layers' cached keys and values and continues from the drafts' residual streams.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.core.errors import require
from sparse_lm.core.tree import Tree
from sparse_lm.inference.decode import Decoder
from sparse_lm.kernels.topk import top
from sparse_lm.layers.cache import truncated
from sparse_lm.model import lm

Array = jax.Array
CLOSE = (
  1e-5  # logits that differ by less may swap their order when several tokens are computed at once
)


@dataclasses.dataclass
class Counts:
  """Statistics of self-speculative decoding.

  Attributes:
    drafted: number of drafted tokens.
    accepted: number of drafted tokens that the whole model agreed with.
    rounds: number of verifications.
    close: number of tokens, without the first, whose two best logits differed by less than `CLOSE`. At
      such a token, the text may start to differ from that of plain decoding.
  """

  drafted: int = 0
  accepted: int = 0
  rounds: int = 0
  close: int = 0

  def __str__(self) -> str:
    share = self.accepted / max(self.drafted, 1)
    made = (self.accepted + self.rounds) / max(self.rounds, 1)
    return (
      f'{share:.1%} of {self.drafted} drafts accepted, {made:.2f} tokens per verification, {self.close} '
      f'tokens whose two best logits differ by less than {CLOSE:g}'
    )


class SelfSpeculation:
  """Greedy decoding of one sequence, in rounds of several drafts and one verification.

  The constructor raises a UserError if the layers of the model cannot run in two parts, or if the draft
  length or the exit layer is out of range.

  Attributes:
    decoder: decoder of the model, for the prompt and for the last tokens of the context.
    draft: number of tokens per round that are drafted.
    exit_layer: number of layers that draft; 0 means half of all layers.
    counts: statistics of all generated texts.
  """

  def __init__(self, decoder: Decoder, draft: int = 4, exit_layer: int = 0) -> None:
    spec = decoder.model.spec
    lm.check_splits(decoder.model)
    exit_layer = exit_layer or spec.layers // 2
    valid = f'1 to {spec.layers - 1}' if spec.layers > 1 else 'none, for a model with one layer'
    require(
      1 <= exit_layer < spec.layers, '--exit_layer', exit_layer, f'{valid} (config.model.layers)'
    )
    require(
      1 <= draft < spec.context,
      '--speculate',
      draft,
      f'1 to {spec.context - 1}, so that the drafts and one more token fit config.data.context',
    )
    self.decoder, self.draft, self.exit_layer = decoder, draft, exit_layer
    self.counts = Counts()

  @functools.cached_property
  def round(self) -> Callable[..., tuple[Array, Array, Array, Tree]]:
    """`(variables, cache, token_B, position_B) -> (tokens_BxL, accepted_B, margins_BxL, cache)`.

    `draft` tokens are drafted after the newest token `token_B`, which no layer has read yet. The first
    `accepted + 1` tokens of each row are the whole model's. Margins are the differences of the two best
    logits.
    """
    return jax.jit(self._round, donate_argnums=1)

  def _round(
    self, variables: Tree, cache: Tree, token_B: Array, position_B: Array
  ) -> tuple[Array, Array, Array, Tree]:
    model, ends = self.decoder.model, self.exit_layer

    def shallow(cache: Tree, token_B: Array, position_B: Array) -> tuple[Array, Tree]:
      tokens = {'tokens_BxL': token_B[:, None], 'positions_BxL': position_B[:, None]}
      return self.decoder.apply(variables, cache, last=ends, **tokens)

    def draft(
      carry: tuple[Tree, Array], place: Array
    ) -> tuple[tuple[Tree, Array], tuple[Array, Array]]:
      cache, token_B = carry
      x_Bx1xD, cache = shallow(cache, token_B, position_B + place)
      logits = model.apply(variables, mode='decode', stream_BxLxD=x_Bx1xD, first=model.spec.layers)
      token_B = jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)
      return (cache, token_B), (x_Bx1xD[:, 0], token_B)

    (cache, last_B), (x_KxBxD, drafts_KxB) = jax.lax.scan(
      draft, (cache, token_B), jnp.arange(self.draft)
    )
    x_Bx1xD, cache = shallow(cache, last_B, position_B + self.draft)
    x_BxLxD = jnp.concatenate([x_KxBxD.swapaxes(0, 1), x_Bx1xD], axis=1)
    places_BxL = position_B[:, None] + jnp.arange(self.draft + 1)
    logits_BxLxV, cache = self.decoder.apply(
      variables,
      cache,
      stream_BxLxD=x_BxLxD,
      positions_BxL=places_BxL,
      first=ends,
      continues=True,
    )
    tokens_BxL, margin_BxL = _best(logits_BxLxV)
    agrees_BxK = tokens_BxL[:, :-1] == drafts_KxB.T
    accepted_B = jnp.sum(jnp.cumprod(agrees_BxK, axis=1), axis=1, dtype=jnp.int32)
    cache = truncated(cache, position_B + accepted_B + 1)
    return tokens_BxL, accepted_B, margin_BxL, cache

  def generate(self, prompt: np.ndarray, tokens: int) -> Iterator[int]:
    """Yields the next tokens of a sequence.

    Raises:
      UserError: the context has no room for so many tokens, or for one round of drafts.
    """
    decoder, counts = self.decoder, self.counts
    decoder.check_prompts([prompt])
    decoder.check_room([prompt], tokens)
    context = decoder.model.spec.context
    room = context - len(prompt)
    require(
      self.draft < room,
      '--speculate',
      self.draft,
      f'{f"1 to {room - 1}" if room > 1 else "0"} after a prompt of {len(prompt)} tokens '
      f'(config.data.context={context})',
    )
    logits, cache, position_B = decoder.begin([prompt], self.draft + 1)
    token = int(jnp.argmax(logits[0]))
    yield token
    made, variables = 1, decoder.variables
    while made < tokens:
      place_B = position_B + made - 1
      newest_B = np.array([token], np.int32)
      if place_B[0] + self.draft < context:
        *found, cache = self.round(variables, cache, newest_B, place_B)
        (row,), (accepted,), (margins,) = jax.device_get(found)
        counts.rounds += 1
        counts.drafted += self.draft
        counts.accepted += int(accepted)
      else:
        logits, cache = decoder.decode(variables, cache, newest_B, place_B)
        (row, margins), accepted = jax.device_get(_best(logits)), 0
      kept = min(int(accepted) + 1, tokens - made)
      counts.close += int(np.sum(margins[:kept] < CLOSE))
      yield from (int(one) for one in row[:kept])
      made, token = made + kept, int(row[kept - 1])


def _best(logits: Array) -> tuple[Array, Array]:
  """Returns the most likely token, int32, and the difference of the two best logits."""
  best, index = top(logits, 2)
  return index[..., 0], best[..., 0] - best[..., 1]


def check_greedy(temperature: float, prompts: Sequence[object]) -> None:
  """Raises a UserError for sampling or for several prompts, which self-speculation does not support."""
  require(temperature == 0, '--temperature with --speculate', temperature, '0 (greedy)')
  require(len(prompts) == 1, 'number of --prompt with --speculate', len(prompts), '1')
