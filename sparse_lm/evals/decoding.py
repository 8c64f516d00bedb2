"""How fast packed models prefill and decode, each beside its dense twin, in turns in one process."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.core.format import is_packed
from sparse_lm.evals import speed
from sparse_lm.inference.decode import Decoder
from sparse_lm.inference.pack import PackedModel, kept_weights, shares, weights
from sparse_lm.model import lm
from sparse_lm.plan import cost

DECODED = 16  # tokens of a turn


@dataclasses.dataclass(frozen=True)
class Workload:
  """What is timed.

  Attributes:
    tokens_BxL: int32, real text: what gates let through depends on it.
    prompt: tokens of each sequence that are prefilled, before `DECODED` more are decoded.
    repeats: turns.
    what: 'decode', 'prefill', or both.
  """

  tokens_BxL: np.ndarray
  prompt: int
  repeats: int = 15
  what: tuple[str, ...] = ('decode', 'prefill')

  @property
  def batch(self) -> int:
    """Sequences side by side."""
    return len(self.tokens_BxL)


def workload(
  tokens: np.ndarray, context: int, batch: int, repeats: int, what: str = ''
) -> Workload:
  """Sequences of a text as long as a context. Raises UserError where the text is too short."""
  if context <= DECODED or len(tokens) < batch * context:
    raise UserError(
      f'--batch={batch} sequences of config.data.context={context}: a context of more than {DECODED} and '
      f'{batch * context} tokens of validation text are needed, of which there are {len(tokens)}'
    )
  rows = np.asarray(tokens[: batch * context], np.int32).reshape(batch, context)
  return Workload(rows, context - DECODED, repeats, (what,) if what else Workload.what)


class _Decode:
  """Decodes the tokens after the prompt; each time from the cache that the prompt left."""

  def __init__(self, decoder: Decoder, work: Workload) -> None:
    self.decoder, self.work = decoder, work
    length_B = np.full(work.batch, work.prompt, np.int32)
    cache = decoder.cache(work.batch)
    _, self.begun = decoder.prefill(
      decoder.variables, cache, work.tokens_BxL[:, : work.prompt], length_B
    )
    self.prepare()

  def prepare(self) -> Any:
    self.cache = jax.tree.map(jnp.copy, self.begun)
    return self.cache

  def __call__(self) -> jax.Array:
    for place in range(self.work.prompt, self.work.prompt + DECODED):
      position_B = np.full(self.work.batch, place, np.int32)
      token_B = self.work.tokens_BxL[:, place]
      logits, self.cache = self.decoder.decode(
        self.decoder.variables, self.cache, token_B, position_B
      )
    return logits

  @property
  def peak_memory(self) -> int | None:
    """Of a step, by XLA's account."""
    token_B = self.work.tokens_BxL[:, 0]
    lowered = self.decoder.decode.lower(self.decoder.variables, self.cache, token_B, token_B)
    return speed.peak_memory(lowered.compile())


class _Prefill:
  """Reads whole sequences into an empty cache."""

  def __init__(self, decoder: Decoder, work: Workload) -> None:
    self.decoder, self.work = decoder, work
    self.length_B = np.full(work.batch, work.tokens_BxL.shape[1], np.int32)
    self.empty = decoder.cache(work.batch)
    self.prepare()

  def prepare(self) -> Any:
    self.cache = jax.tree.map(jnp.copy, self.empty)
    return self.cache

  def __call__(self) -> jax.Array:
    return self.decoder.prefill(
      self.decoder.variables, self.cache, self.work.tokens_BxL, self.length_B
    )


def measure(
  pairs: dict[str, tuple[PackedModel, PackedModel]], work: Workload
) -> dict[str, dict[str, Any]]:
  """Numbers of each packed model and its dense twin.

  Returns:
    By name `decode_ms` (of a token of every sequence), `prefill_tokens_per_second`, `peak_memory`
    (bytes), `weights_bytes`, `kept_weights` (share of the kernels' weights that packing left: units that
    masks disconnect are removed), `read_bytes` (of weights that a token reads, gates as measured on the
    text; of batch 1 only), `bandwidth` (of them, over the machine's measured one), the same with
    `dense_` before it, and `decode_speedup`, `prefill_speedup` with `_low` and `_high`, their quartiles
    over the turns.
  """
  decoders = {
    (name, role): Decoder(packed.model, packed.variables)
    for name, pair in pairs.items()
    for role, packed in zip(('', 'dense_'), pair)
  }
  kinds = {'decode': _Decode, 'prefill': _Prefill}
  reading, bytes_ = speed.read()
  calls: dict[Any, Any] = {
    (what, *key): kinds[what](decoder, work)
    for what in work.what
    for key, decoder in decoders.items()
  }
  seconds = speed.interleaved(calls | {'read': reading}, work.repeats, 'decoding')
  peak = bytes_ / float(np.median(seconds['read']))
  found = {}
  for name, pair in pairs.items():
    row: dict[str, Any] = {'memory_bandwidth': peak}
    for role, packed in zip(('', 'dense_'), pair):
      row[f'{role}weights_bytes'] = weights(packed.variables)
      row[f'{role}kept_weights'] = kept_weights(packed)
      medians = {what: float(np.median(seconds[what, name, role])) for what in work.what}
      if 'prefill' in medians:
        row[f'{role}prefill_tokens_per_second'] = work.tokens_BxL.size / medians['prefill']
      if 'decode' in medians:
        step = medians['decode'] / DECODED
        # Side by side, sequences share what they read.
        read = read_bytes(packed, work.tokens_BxL) if work.batch == 1 else None
        row |= {
          f'{role}decode_ms': 1e3 * step,
          f'{role}peak_memory': calls['decode', name, role].peak_memory,
          f'{role}read_bytes': read,
          f'{role}bandwidth': None if read is None else read / step / peak,
        }
    for what in work.what:
      ratio = speed.ratio(seconds[what, name, 'dense_'], seconds[what, name, ''])
      row |= {f'{what}_{key.replace("ratio", "speedup")}': value for key, value in ratio.items()}
    found[name] = row
  return found


def read_bytes(packed: PackedModel, tokens_BxL: np.ndarray) -> int:
  """Bytes of weights that a token of a batch of one reads, gates as they are on the text."""
  model = packed.model
  run = jax.jit(lambda v, t: model.apply(v, t, mode='eval', mutable=['gates'])[1])
  seen = tree.named(run(packed.variables, tokens_BxL).get('gates', {}))
  active = {path.removesuffix('/active'): value for path, value in seen.items()}
  held = {
    tree.path_name(path): leaf.nbytes
    for path, leaf in jax.tree_util.tree_leaves_with_path(packed.variables, is_leaf=is_packed)
  }

  def skips(gate: cost.Gate) -> bool:
    # Hidden units, selected by an MLP or by its activation, are skipped where the rows behind them are
    # gathered.
    paths = (f'{module}/down/kernel' for module in (gate.path, gate.path.rpartition('/')[0]))
    down = next((packed.matrices[path] for path in paths if path in packed.matrices), None)
    return gate.skips and (down is None or down.runs.selects == -2)

  read = shares(model, tokens_BxL.shape[1], active, skips)
  for path, parts in lm.packable(model).fused.items():
    read[f'{path}/kernel'] = read[f'{parts[0]}/kernel']  # all parts run under the same gates
  stored = {p: held.get(f'packed/{p}', held.get(f'params/{p}', 0)) for p in read}
  return round(sum(stored[path] * share for path, share in read.items()))
