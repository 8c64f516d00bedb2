"""The language model, assembled from slots."""

import functools
from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from sparse_lm.core.errors import UserError, require
from sparse_lm.core.paths import Part
from sparse_lm.core.tree import Tree
from sparse_lm.kernels.cross_entropy import Readout
from sparse_lm.layers.embed import Embed
from sparse_lm.layers.linear import Norm
from sparse_lm.layers.method import LayerMethod, Run
from sparse_lm.layers.progress import Progress
from sparse_lm.layers.sow import Exit
from sparse_lm.layers.spec import NO_REMAT, REMAT, Spec
from sparse_lm.layers.tokens import Tokens
from sparse_lm.model import scanned
from sparse_lm.model.block import Block
from sparse_lm.model.scanned import Passes
from sparse_lm.model.slots import LAYER_SLOTS, MethodConfig, SlotConfig, Supplied
from sparse_lm.plan import record, sites

MODES = ('train', 'eval')  # 'decode' is 'eval' for one reader at a time


def _with_sites(call: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """A model's call in which its method of the site slot acts on the activations that modules name."""

  @functools.wraps(call)
  def run(self: 'LM | Layer', *arguments: Tree, **keywords: Tree) -> jax.Array:
    method = self.site.module(self.spec)
    with sites.acting(method.where, method.act):
      return call(self, *arguments, **keywords)

  return run


class LM(nn.Module):
  """Decoder-only transformer whose activation, attention, MLP, depth and stack are slots.

  What methods may sow is said in `layers/sow.py`; they keep variables of their own in any other
  collection.

  Attributes:
    slots: one `SlotConfig` for each of `LAYER_SLOTS`, in that order.
    stack: what runs the layers.
    site: what acts on activations that modules name, see `plan/sites.py`.
  """

  spec: Spec
  slots: tuple[SlotConfig, ...]
  stack: MethodConfig
  site: MethodConfig

  @nn.compact
  @_with_sites
  def __call__(
    self,
    tokens_BxL: jax.Array | None = None,
    mode: str = 'eval',
    positions_BxL: jax.Array | None = None,
    valid_BxL: jax.Array | None = None,
    embeddings_BxLxD: jax.Array | None = None,
    continues: bool = False,
    stream_BxLxD: jax.Array | None = None,
    first: int = 0,
    last: int | None = None,
    progress: Progress | None = None,
    readout: bool = False,
  ) -> jax.Array | Readout:
    """Logits for each next token, or the residual stream where not all layers run.

    Args:
      tokens_BxL: int32.
      mode: 'train' (random draws, dropout), 'eval', or 'decode': what 'eval' computes (but that no
        expert drops a token) without what gates skip. With the `cache` collection mutable the first
        call begins sequences, and each later call goes on with a token of each, or with several.
      positions_BxL: int32, by default 0, 1, 2, ...
      valid_BxL: bool, whether a token may be read; by default all.
      embeddings_BxLxD: what the first layer reads in place of embedded tokens: of an image, of sound, or
        of a policy's input. Learned positions are added to them as to tokens.
      continues: whether several tokens go on behind those that the cache holds, each reading the ones
        before it; else they begin sequences. The cache must have been made for so many, see
        `cache_shapes`.
      stream_BxLxD: the residual stream that layer `first` reads, in place of tokens, see `check_splits`.
      first: the layer that runs first. Behind the last one there are norm and head alone.
      last: the layer before which the pass ends, `None` = behind the head.
      progress: where training stands, for schedules of modules.
      readout: whether to return what logits are computed from in their place, see `Embed.predicted`.

    Returns logits, float32 `[B, L, V]`, or `[B, L, D]` where `last` is given. Raises ValueError for an
    unknown mode, and unless one of tokens, embeddings and stream is given.
    """
    if mode not in (*MODES, 'decode'):
      raise ValueError(f'mode {mode!r} is none of {(*MODES, "decode")}')
    given = [a for a in (tokens_BxL, embeddings_BxLxD, stream_BxLxD) if a is not None]
    if len(given) != 1:
      raise ValueError('either tokens_BxL or embeddings_BxLxD or stream_BxLxD is to be given')
    spec, shape = self.spec, given[0].shape[:2]
    in_order = positions_BxL is None
    whole = in_order and valid_BxL is None
    if in_order:
      positions_BxL = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    if valid_BxL is None:
      valid_BxL = jnp.ones(shape, bool)
    embed, end = Embed(spec, name='embed'), spec.layers if last is None else last
    if stream_BxLxD is None:
      enters = embed if embeddings_BxLxD is None else embed.placed
      stream_BxLxD = enters(given[0], None if in_order else positions_BxL)
      stream_BxLxD = nn.Dropout(spec.dropout, deterministic=mode != 'train')(stream_BxLxD)
    tokens = Tokens(stream_BxLxD, positions_BxL, valid_BxL, continues, whole, progress)
    x_BxLxD = self._run(tokens, range(first, end), mode) if first < end else stream_BxLxD
    if last is not None:
      return x_BxLxD
    x_BxLxD = record.site(self, Part.RESIDUAL.of(spec.layers), x_BxLxD)
    return embed.predicted(Norm(spec, name='norm')(x_BxLxD), tokens_BxL, readout)

  def _run(self, tokens: Tokens, layers: range, mode: str) -> jax.Array:
    """The residual stream `[B, L, D]` after these layers, but for those that were removed."""
    present = [layer for layer in layers if not self.has_variable('packed', Part.REMOVED.of(layer))]
    stack = self.stack.make({'spec': self.spec, 'name': 'stack'})
    runs = []
    for passes in self._passes(present, mode, mode in stack.traits.scans):
      if len(passes) == 1:
        runs.append(_layer(self, *passes[0]))
      else:
        together = _Layers(self.spec, self.slots, passes[0], parent=None)
        runs.append(scanned.run(self, together, passes, self.spec.remat != NO_REMAT))
    return stack(runs, tokens, mode)

  def _passes(self, layers: list[int], mode: str, scans: bool) -> list[Passes]:
    """Layers that run as one scan, see `scanned.split`, and those that run by themselves."""
    # A scan cannot create variables, and plans name every layer: both need layers that run by themselves.
    makes = any(self.is_mutable_collection(name) for name in ('params', 'cache'))
    least = scanned.least(self.spec.scan_layers)
    if least is None or makes or not scans or not record.layers_alike():
      return [((layer,),) for layer in layers]
    kinds = [(_methods(self, layer), scanned.kind(self.variables, layer)) for layer in layers]
    return list(scanned.split(layers, kinds, least))


def _methods(model: LM, layer: int) -> tuple[MethodConfig, ...]:
  return tuple(slot.at(layer, model.spec.layers) for slot in model.slots)


def _layer(parent: 'LM | Layer | _Layers', layer: int) -> Run:
  """Makes a layer, whose modules belong to `parent`, in which this is called.

  Returns `(tokens, mode) -> the residual stream [B, L, D] after the layer`.
  """
  spec = parent.spec
  made: dict[str, Callable[..., LayerMethod]] = {}
  for slot in parent.slots:
    # A maker: a module is made where it is called, so that it lives there.
    supplied = {'spec': spec, 'activation': made.get('activation'), 'name': slot.slot}
    made[slot.slot] = functools.partial(_make, slot.at(layer, spec.layers), supplied)
  block_type = Block
  if spec.remat != NO_REMAT:
    block_type = nn.remat(Block, static_argnums=(2,), policy=REMAT[spec.remat])
  block = block_type(spec, made['attention'], made['mlp'], name=Part.BLOCK.of(layer))
  depth = made['depth'](name=Part.DEPTH.of(layer))

  def run(tokens: Tokens, mode: str) -> jax.Array:
    x_BxLxD = record.site(parent, Part.RESIDUAL.of(layer), tokens.x)
    return depth(block, tokens.replace(x=x_BxLxD), mode)

  return run


def _make(own: MethodConfig, supplied: Supplied, **more: str) -> LayerMethod:
  return own.make(supplied | more)


class _Layers(nn.Module):
  """Some layers of the model, one after the other; their variables are named as in the whole model."""

  spec: Spec
  slots: tuple[SlotConfig, ...]
  layers: tuple[int, ...]

  @nn.compact
  def __call__(self, tokens: Tokens, mode: str) -> jax.Array:
    """The residual stream `[B, L, D]` after the last of them."""
    for layer in self.layers:
      tokens = tokens.replace(x=_layer(self, layer)(tokens, mode))
    return tokens.x


class Layer(nn.Module):
  """One layer of the model by itself; its variables are named as in the whole."""

  spec: Spec
  slots: tuple[SlotConfig, ...]
  layer: int
  site: MethodConfig

  @nn.compact
  @_with_sites
  def __call__(self, x_BxLxD: jax.Array, mode: str = 'eval') -> jax.Array:
    """The residual stream `[B, L, D]` after it, of whole sequences."""
    positions_BxL = jnp.broadcast_to(jnp.arange(x_BxLxD.shape[1]), x_BxLxD.shape[:2])
    valid_BxL = jnp.ones(x_BxLxD.shape[:2], bool)
    tokens = Tokens(x_BxLxD, positions_BxL, valid_BxL, whole=True)
    return _layer(self, self.layer)(tokens, mode)


def from_config(config: ConfigDict, vocab: int) -> LM:
  """The model that a config describes. Raises UserError where it describes none."""
  spec = Spec.from_config(config.model, vocab, config.data.context)
  slots = tuple(SlotConfig.from_config(slot, config[slot]) for slot in LAYER_SLOTS)
  alone = [MethodConfig.from_config(slot, slot, config[slot]) for slot in ('stack', 'site')]
  model = LM(spec, slots, *alone)
  for own in running(model):
    own.check(spec)
  _check_credit(model)
  _check_scans(model)
  return model


def running(model: LM) -> list[MethodConfig]:
  """The methods that run in any layer, the one that runs the layers, and the one that acts at sites."""
  layers = [own for slot in model.slots for own in slot.running(model.spec.layers)]
  return [*layers, model.stack, model.site]


def notes(model: LM) -> list[str]:
  """Sentences on layers that several rules of a slot name, and on those that none does."""
  return [note for slot in model.slots for note in slot.notes(model.spec.layers)]


def _check_credit(model: LM) -> None:
  """A policy's actions are credited with what comes later in their own sequence.

  So in training all else must be causal, and no other sequence may change it.
  """
  traits = {own: own.traits(model.spec) for own in running(model)}
  for policy in (own for own, declared in traits.items() if declared.policy):
    field = f'{policy.group}.estimator={dict(policy.fields)["estimator"]!r}'
    for own, declared in traits.items():
      if 'train' in declared.non_causal:
        raise UserError(
          f'{field} credits an action with later tokens only, and '
          f'{own.group}.name={own.name!r} is not causal in training; valid: another estimator, '
          'or a method that is causal in both modes'
        )
      if 'train' in declared.couples:
        raise UserError(
          f'{field} credits an action with its own sequence only, and in '
          f'training {own.group}.name={own.name!r} lets the sequences of a batch change each other '
          'with these fields; valid: another estimator, or no limit on what they compete for'
        )


def _check_scans(model: LM) -> None:
  """Raises UserError where `config.model.scan_layers` is 'always' and no layers can be scanned."""
  if model.spec.scan_layers != 'always':
    return
  layers, own, site = range(model.spec.layers), model.stack, model.site.module(model.spec)
  kinds = [_methods(model, layer) for layer in layers]
  alone = all(len(p) == 1 for p in scanned.split(layers, kinds, scanned.least('always')))
  reason = ''
  if 'train' not in own.traits(model.spec).scans:
    reason = f'{own.group}.name={own.name!r} trains layer by layer'
  elif not sites.alike(site.where):
    reason = f'{model.site.group}.where={site.where!r} tells layers apart'
  elif alone:
    reason = (
      f'no group of the {len(layers)} layers (config.model.layers) is followed by an equal one'
    )
  if reason:
    raise UserError(f"config.model.scan_layers='always', but {reason}; valid: 'auto' or 'never'")


def samples(model: LM) -> bool:
  """Whether a gate of the model is a policy whose actions training samples."""
  return any(own.traits(model.spec).policy for own in running(model))


def twin(model: LM) -> LM:
  """The dense twin: each method that runs less is replaced by what it is compared with."""
  spec = model.spec
  layers = tuple(slot.dense(spec) for slot in model.slots)
  return LM(spec, layers, model.stack.dense(spec), model.site.dense(spec))


def causal(model: LM) -> dict[str, bool]:
  """By mode, whether every method that the model runs keeps to the past."""
  traits = [own.traits(model.spec) for own in running(model)]
  return {mode: not any(mode in declared.non_causal for declared in traits) for mode in MODES}


def batch_independent(model: LM) -> dict[str, bool]:
  """By mode, whether a sequence's logits are the same whatever else its batch holds."""
  traits = [own.traits(model.spec) for own in running(model)]
  return {mode: not any(mode in declared.couples for declared in traits) for mode in MODES}


def check_decodes(model: LM) -> None:
  """Raises UserError where a method cannot decode: its decision is not one token's own."""
  for own in running(model):
    if not own.traits(model.spec).decodes:
      raise UserError(
        f'{own.group}.name={own.name!r} decides over a whole batch with these fields and cannot '
        f'decode; valid: another {own.group}.estimator, or another method'
      )


def check_splits(model: LM) -> None:
  """Raises UserError where the model's layers cannot run in two parts, one after the other."""
  own = model.stack
  if not own.traits(model.spec).splits:
    raise UserError(
      f'{own.group}.name={own.name!r} carries more than the residual stream from layer to layer, which '
      'cannot run in parts; valid: a stack whose traits say that it splits'
    )
  valid = (
    'False where layers run in parts: the table is looked up by tokens, which the last part has not'
  )
  require(not model.spec.bigram, 'config.model.bigram', model.spec.bigram, valid)


def exits(
  model: LM, variables: Tree, sown: Tree, readout: bool = False
) -> list[tuple[jax.Array | Readout, jax.Array]]:
  """What the head predicts from the `exits` that a training pass sowed, and the weight of each.

  Args:
    variables: of the model.
    sown: collections that the pass wrote.
    readout: as in the model's call.

  Returns:
    Pairs of float32 logits `[B, L, V]`, or what they are computed from, and a float32 scalar.
  """
  found = jax.tree.leaves(sown.get('exits', {}), is_leaf=lambda node: isinstance(node, Exit))
  head = functools.partial(
    model.apply, variables, mode='train', first=model.spec.layers, readout=readout
  )
  return [(head(stream_BxLxD=own.x_BxLxD), own.weight) for own in found]


def cache_shapes(model: LM, variables: Tree, batch: int, together: int = 1) -> Tree:
  """The `cache` collection for so many sequences, as shape structs; sizes are those of `variables`.

  Args:
    together: tokens of a sequence that go on in one call, at most.
  """
  token = jnp.zeros((batch, together), jnp.int32)
  # As in `init`: every layer makes its part, whether a token would enter it or not.
  make = flax.core.apply(
    lambda scope: model.clone(parent=scope)(token, mode='decode'),
    mutable=['cache'],
    flags={'initializing': True},
  )
  return jax.eval_shape(make, variables)[1]['cache']
