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

MODES = ('train', 'eval')  # 'decode' computes the same as 'eval', token by token


def _with_sites(call: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """Wraps a model's `__call__` so that its site method changes activations."""

  @functools.wraps(call)
  def run(self: 'LM | Layer', *arguments: Tree, **keywords: Tree) -> jax.Array:
    method = self.site.module(self.spec)
    with sites.acting(method.where, method.act_in, method.traits.gating):
      return call(self, *arguments, **keywords)

  return run


class LM(nn.Module):
  """A decoder-only transformer whose activation, attention, MLP, depth and stack are slots.

  `layers/sow.py` lists the collections that methods may sow into. Their own variables are in other
  collections.

  Attributes:
    spec: the model's dimensions.
    slots: one `SlotConfig` for each of `LAYER_SLOTS`, in this order.
    stack: the method that runs the layers.
    site: the method that changes activations at sites (`plan/sites.py`).
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
    """Returns logits for each next token, or the residual stream if `last` is given.

    Exactly one of `tokens_BxL`, `embeddings_BxLxD` and `stream_BxLxD` must be given.

    Args:
      tokens_BxL: int32 tokens.
      mode: 'train' (with dropout and sampled gates), 'eval', or 'decode': the same as 'eval', but the
        computation behind closed gates is skipped and experts drop no tokens. If the `cache` collection
        is mutable, the first call begins the sequences, and each later call continues them.
      positions_BxL: int32 positions; 0, 1, 2, ... by default.
      valid_BxL: bool, whether other tokens may read a token; all by default.
      embeddings_BxLxD: embeddings (of an image, for example) to read instead of tokens, without
        positions.
      continues: whether several tokens continue the sequences in the cache, which must be allocated for
        this number of tokens (`cache_shapes`). Otherwise, they begin new sequences.
      stream_BxLxD: the residual stream before layer `first`, instead of tokens (`check_splits`).
      first: the first layer to run. If it is the number of layers, only the norm and the head run.
      last: the pass stops before this layer; `None` means that it includes the head.
      progress: training progress, for modules with a schedule.
      readout: whether to return a `Readout` instead of logits (`Embed.predicted`).

    Returns float32 `[B, L, V]`, or `[B, L, D]` if `last` is given. Raises ValueError for wrong arguments.
    """
    if mode not in (*MODES, 'decode'):
      raise ValueError(f'mode={mode!r} is not valid; valid: {(*MODES, "decode")}')
    given = [a for a in (tokens_BxL, embeddings_BxLxD, stream_BxLxD) if a is not None]
    if len(given) != 1:
      raise ValueError('exactly one of tokens_BxL, embeddings_BxLxD and stream_BxLxD must be given')
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
    """Runs these layers except removed ones; returns the residual stream `[B, L, D]`."""
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
    """Splits layers into scans (see `scanned.split`) and single layers."""
    # A scan cannot create variables, and a plan names each layer's modules: both need single layers.
    makes = any(self.is_mutable_collection(name) for name in ('params', 'cache'))
    least = scanned.min_layers(self.spec.scan_layers)
    if least is None or makes or not scans or not record.layers_alike():
      return [((layer,),) for layer in layers]
    kinds = [(_methods(self, layer), scanned.kind(self.variables, layer)) for layer in layers]
    return list(scanned.split(layers, kinds, least))


def _methods(model: LM, layer: int) -> tuple[MethodConfig, ...]:
  return tuple(slot.at(layer, model.spec.layers) for slot in model.slots)


def _layer(parent: 'LM | Layer | _Layers', layer: int) -> Run:
  """Constructs a layer as submodules of `parent`, whose compact method calls this.

  Returns `(tokens, mode) -> residual stream [B, L, D] after the layer`.
  """
  spec = parent.spec
  made: dict[str, Callable[..., LayerMethod]] = {}
  for slot in parent.slots:
    # A constructor, not a module: a module belongs to the module that constructs it.
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
  """A sequence of layers whose variables are named as in the model."""

  spec: Spec
  slots: tuple[SlotConfig, ...]
  layers: tuple[int, ...]

  @nn.compact
  def __call__(self, tokens: Tokens, mode: str) -> jax.Array:
    """Returns the residual stream `[B, L, D]` after the last layer."""
    for layer in self.layers:
      tokens = tokens.replace(x=_layer(self, layer)(tokens, mode))
    return tokens.x


class Layer(nn.Module):
  """A single layer of the model; its variables are named as in the model."""

  spec: Spec
  slots: tuple[SlotConfig, ...]
  layer: int
  site: MethodConfig

  @nn.compact
  @_with_sites
  def __call__(self, x_BxLxD: jax.Array, mode: str = 'eval') -> jax.Array:
    """Returns the residual stream `[B, L, D]` after the layer, for whole sequences."""
    positions_BxL = jnp.broadcast_to(jnp.arange(x_BxLxD.shape[1]), x_BxLxD.shape[:2])
    valid_BxL = jnp.ones(x_BxLxD.shape[:2], bool)
    tokens = Tokens(x_BxLxD, positions_BxL, valid_BxL, whole=True)
    return _layer(self, self.layer)(tokens, mode)


def from_config(config: ConfigDict, vocab: int) -> LM:
  """Builds the model that a config describes. Raises a UserError if the config is not valid."""
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
  """Returns all methods of the model: those of any layer, the stack method and the site method."""
  layers = [own for slot in model.slots for own in slot.running(model.spec.layers)]
  return [*layers, model.stack, model.site]


def notes(model: LM) -> list[str]:
  """Returns notes on layers to which several rules of a slot apply, or none."""
  return [note for slot in model.slots for note in slot.notes(model.spec.layers)]


def _check_credit(model: LM) -> None:
  """Raises a UserError if a policy cannot assign credit to its actions.

  The reward of an action is the loss of later tokens in its own sequence. So in training, all methods
  must be causal, and no sequence may influence another.
  """
  traits = {own: own.traits(model.spec) for own in running(model)}
  for policy in (own for own, declared in traits.items() if declared.policy):
    field = f'{policy.group}.estimator={dict(policy.fields)["estimator"]!r}'
    for own, declared in traits.items():
      if 'train' in declared.non_causal:
        raise UserError(
          f'{field} rewards an action by the loss of later tokens only, but '
          f'{own.group}.name={own.name!r} is not causal in training; valid: another estimator, '
          'or a method that is causal in both modes'
        )
      if 'train' in declared.couples:
        raise UserError(
          f'{field} rewards an action by the loss of its own sequence only, but with these fields '
          f'{own.group}.name={own.name!r} lets the sequences of a batch influence each other in '
          'training; valid: another estimator, or no limit that sequences share'
        )


def _check_scans(model: LM) -> None:
  """Raises a UserError if `config.model.scan_layers` is 'always' but no layers can be scanned."""
  if model.spec.scan_layers != 'always':
    return
  layers, own, site = range(model.spec.layers), model.stack, model.site.module(model.spec)
  kinds = [_methods(model, layer) for layer in layers]
  alone = all(len(p) == 1 for p in scanned.split(layers, kinds, scanned.min_layers('always')))
  reason = ''
  if 'train' not in own.traits(model.spec).scans:
    reason = f'{own.group}.name={own.name!r} cannot train with scanned layers'
  elif not sites.alike(site.where):
    reason = f'{model.site.group}.where={site.where!r} acts on some layers only'
  elif alone:
    reason = f'no consecutive layers of the {len(layers)} (config.model.layers) are equal'
  if reason:
    raise UserError(f"config.model.scan_layers='always', but {reason}; valid: 'auto' or 'never'")


def has_policy(model: LM) -> bool:
  """Returns whether a gate of the model is a policy, whose actions are sampled in training."""
  return any(own.traits(model.spec).policy for own in running(model))


def dense_twin(model: LM) -> LM:
  """Returns the dense twin: the same model with the dense counterpart of each method."""
  spec = model.spec
  layers = tuple(slot.dense(spec) for slot in model.slots)
  return LM(spec, layers, model.stack.dense(spec), model.site.dense(spec))


def causal(model: LM) -> dict[str, bool]:
  """Returns, by mode, whether no method of the model reads later tokens."""
  traits = [own.traits(model.spec) for own in running(model)]
  return {mode: not any(mode in declared.non_causal for declared in traits) for mode in MODES}


def batch_independent(model: LM) -> dict[str, bool]:
  """Returns, by mode, whether a sequence's logits do not depend on the other sequences of its batch."""
  traits = [own.traits(model.spec) for own in running(model)]
  return {mode: not any(mode in declared.couples for declared in traits) for mode in MODES}


def check_decodes(model: LM) -> None:
  """Raises a UserError if a method cannot decode, because it decides for a whole batch at once."""
  for own in running(model):
    if not own.traits(model.spec).decodes:
      raise UserError(
        f'{own.group}.name={own.name!r} decides for a whole batch at once with these fields, so it '
        f'cannot decode; valid: another {own.group}.estimator, or another method'
      )


def check_splits(model: LM) -> None:
  """Raises a UserError if the first layers cannot run alone and the others later."""
  own = model.stack
  if not own.traits(model.spec).splits:
    raise UserError(
      f'{own.group}.name={own.name!r} passes more than the residual stream between layers, so the layers '
      'cannot run in two parts; valid: a stack method whose traits have splits=True'
    )
  valid = (
    'False if the layers run in two parts, because the bigram table needs tokens and the last part has '
    'none'
  )
  require(not model.spec.bigram, 'config.model.bigram', model.spec.bigram, valid)


def exit_predictions(
  model: LM, variables: Tree, sown: Tree, readout: bool = False
) -> list[tuple[jax.Array | Readout, jax.Array]]:
  """Returns the head's predictions from the `exits` that a training pass sowed, with their weights.

  Args:
    model: the model.
    variables: its variables.
    sown: collections that the pass returned.
    readout: as in the model's call.

  Returns:
    Pairs of logits (float32 `[B, L, V]`) or a `Readout`, and a float32 weight.
  """
  found = jax.tree.leaves(sown.get('exits', {}), is_leaf=lambda node: isinstance(node, Exit))
  head = functools.partial(
    model.apply, variables, mode='train', first=model.spec.layers, readout=readout
  )
  return [(head(stream_BxLxD=own.x_BxLxD), own.weight) for own in found]


def cache_shapes(model: LM, variables: Tree, batch: int, together: int = 1) -> Tree:
  """Returns the `cache` collection as shape structs.

  Args:
    model: the model.
    variables: its variables; packed ones may need a smaller cache.
    batch: number of sequences.
    together: the most tokens that continue a sequence in one call.
  """
  token = jnp.zeros((batch, together), jnp.int32)
  # As in `init`, every layer creates its variables, even if no token would enter it.
  make = flax.core.apply(
    lambda scope: model.clone(parent=scope)(token, mode='decode'),
    mutable=['cache'],
    flags={'initializing': True},
  )
  return jax.eval_shape(make, variables)[1]['cache']
