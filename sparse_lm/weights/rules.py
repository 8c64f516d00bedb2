"""Rules: several weight methods in one model, each for parameters of its own.

A parameter belongs to the first rule one of whose expressions is found in its path, as the labels of
`optax.partition` are first come, first served. The sparsity of a rule is over all prunable weights that
the rule owns together, so two rules of 50 % may drop 50 % of the model, or less where no rule owns the
rest.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.core.tree import Tree
from sparse_lm.weights.method import Array, MaskUpdate, Sparse, WeightMethod
from sparse_lm.weights.traits import Traits

SHOWN = 3  # paths that a sentence names before it counts the others


@dataclasses.dataclass(frozen=True)
class Rule:
  """A method and the parameters that it decides about.

  Attributes:
    paths: of those parameters.
  """

  name: str
  method: WeightMethod
  paths: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Rules(WeightMethod):
  """Several methods in one model.

  What the methods learn stands in `trainable['learned']` by rule, what else they keep in `sparse.extra`.
  Draws follow the paths of leaves, so a rule draws what its method alone would draw. Where a method's
  update replaces an optimizer step, it does so for the parameters that its rule owns: the optimizer,
  its count and all other parameters go on. The only rule of a model replaces the whole step, as its
  method alone does.

  Attributes:
    rules: in the order in which they were matched.
    notes: sentences on what the rules leave to each other and what they leave dense.
  """

  rules: tuple[Rule, ...] = ()
  notes: tuple[str, ...] = ()

  @property
  def parts(self) -> dict[str, WeightMethod]:
    """The method of each rule."""
    return {rule.name: rule.method for rule in self.rules}

  def with_parts(self, parts: Mapping[str, WeightMethod]) -> 'Rules':
    """The same rules, each with the method that `parts` holds under its name."""
    rules = tuple(dataclasses.replace(rule, method=parts[rule.name]) for rule in self.rules)
    return dataclasses.replace(self, rules=rules)

  @functools.cached_property
  def _owners(self) -> dict[str, str]:
    return {path: rule.name for rule in self.rules for path in rule.paths}

  def owner(self, path: str) -> str | None:
    """The rule that owns the parameter."""
    return self._owners.get(path)

  @property
  def traits(self) -> Traits:
    """What holds of all methods, or of any."""
    every = [rule.method.traits for rule in self.rules]
    return Traits(
      needs=tuple(dict.fromkeys(need for traits in every for need in traits.needs)),
      masked=any(traits.masked for traits in every),
      exact_density=all(traits.exact_density for traits in every),
      replaces_step=any(traits.replaces_step for traits in every),
      takes_masks=all(traits.takes_masks for traits in every),
      controlled=any(traits.controlled for traits in every),
      learns_scores=any(traits.learns_scores for traits in every),
    )

  @property
  def one_shot(self) -> bool:
    """Whether all methods prune trained models."""
    return all(rule.method.one_shot for rule in self.rules)

  @property
  def learned_rates(self) -> dict[str, float]:
    """Those of each method, below the rule's name."""
    return {
      f'{rule.name}/{start}': rate
      for rule in self.rules
      for start, rate in rule.method.learned_rates.items()
    }

  def resting(self, updates: tuple[str, ...], trainable: Tree) -> Tree:
    """The leaves of the rules whose update replaces an optimizer step."""
    if len(self.rules) == 1:
      return self.rules[0].method.resting(updates, trainable)
    rest = {name for name in updates if self.parts[name].traits.replaces_step}
    return {
      'params': tree.map_named(lambda path, _: self.owner(path) in rest, trainable['params']),
      'learned': {
        name: jax.tree.map(lambda _, name=name: name in rest, learned)
        for name, learned in trainable['learned'].items()
      },
    }

  def check_one_shot(self) -> None:
    """Raises UserError, naming the rule's field, where a method cannot prune a trained model."""
    for rule in self.rules:
      with fields_of(rule.name):
        rule.method.check_one_shot()

  def init(self, key: Array, params: Tree, target: Tree) -> tuple[Tree, Sparse]:
    """Each method's start, one after the other."""
    learned, extra, masks = {}, {}, jax.tree.map(lambda _: None, params)
    for rule in self.rules:
      trainable, sparse = rule.method.init(key, params, self._own(rule, target))
      params, learned[rule.name] = trainable['params'], trainable['learned']
      masks, extra[rule.name] = joined(params, masks, sparse.masks), sparse.extra
    return {'params': params, 'learned': learned}, Sparse(masks, target, extra)

  def effective(
    self, trainable: Tree, sparse: Sparse, mode: str, step: Array, key: Array | None
  ) -> tuple[Tree, Tree]:
    """Each method's parameters in place of those that it owns, and all their fractions."""
    params, density = trainable['params'], jax.tree.map(lambda _: None, trainable['params'])
    for rule in self.rules:
      params, own = rule.method.effective(
        *self._state(rule, trainable, params, sparse), mode, step, key
      )
      density = joined(params, density, own)
    return params, density

  def penalty(self, trainable: Tree, sparse: Sparse, density: Tree) -> Array:
    """The sum of the methods' penalties, each for the weights that it owns."""
    found = (
      rule.method.penalty(
        *self._state(rule, trainable, trainable['params'], sparse), self._own(rule, density)
      )
      for rule in self.rules
    )
    return sum(found, jnp.float32(0))

  def frozen(self, sparse: Sparse) -> Tree:
    """What each method freezes of the weights that it owns."""
    frozen = super().frozen(sparse)
    for rule in self.rules:
      own = rule.method.frozen(self._own_sparse(rule, sparse))
      frozen = joined(sparse.target, frozen, own)
    return frozen

  def rate_factor(self, target: Tree, step: Array) -> Array | None:
    """The smallest of the methods' factors, for the weights that each of them owns."""
    found = [rule.method.rate_factor(self._own(rule, target), step) for rule in self.rules]
    found = [factor for factor in found if factor is not None]
    return functools.reduce(jnp.minimum, found) if found else None

  def constrain(self, trainable: Tree, sparse: Sparse) -> Tree:
    """Each method's constraint on the weights that it owns."""
    params, learned = trainable['params'], {}
    for rule in self.rules:
      own = rule.method.constrain(*self._state(rule, trainable, params, sparse))
      params, learned[rule.name] = own['params'], own['learned']
    return trainable | {'params': params, 'learned': learned}

  def due(self, step: int) -> bool:
    """Whether any method updates its masks in this step."""
    return any(rule.method.due(step) for rule in self.rules)

  def update_parts(
    self,
    updates: tuple[str, ...],
    trainable: Tree,
    sparse: Sparse,
    signals: dict[str, dict[str, Tree]],
    step: Array,
    key: Array,
  ) -> MaskUpdate:
    """The updates of the rules named, one after the other; the others' masks stay as they are."""
    params, learned = trainable['params'], dict(trainable['learned'])
    masks, extra = sparse.masks, dict(sparse.extra)
    toggled = jax.tree.map(lambda _: None, params)
    for rule in self.rules:
      if rule.name not in updates:
        continue
      own = self._state(rule, trainable, params, sparse)
      change = rule.method.update(*own, signals[rule.name], step, key)
      params, learned[rule.name] = change.trainable['params'], change.trainable['learned']
      masks, extra[rule.name] = tree.merge(masks, change.sparse.masks), change.sparse.extra
      toggled = joined(params, toggled, change.toggled)
    new = Sparse(masks, sparse.target, extra)
    return MaskUpdate(trainable | {'params': params, 'learned': learned}, new, toggled)

  def finalize(self, trainable: Tree, sparse: Sparse, step: Array) -> tuple[Tree, Tree]:
    """Each method's final parameters and masks of what it owns."""
    params, masks = trainable['params'], jax.tree.map(lambda _: None, trainable['params'])
    for rule in self.rules:
      params, own = rule.method.finalize(*self._state(rule, trainable, params, sparse), step)
      masks = joined(params, masks, own)
    return params, masks

  def _own(self, rule: Rule, leaves: Tree) -> Tree:
    return tree.only(rule.paths, leaves)

  def _state(
    self, rule: Rule, trainable: Tree, params: Tree, sparse: Sparse
  ) -> tuple[Tree, Sparse]:
    """The trainable tree and sparse state as the rule's method alone would have them."""
    own = {'params': params, 'learned': trainable['learned'][rule.name]}
    return own, self._own_sparse(rule, sparse)

  def _own_sparse(self, rule: Rule, sparse: Sparse) -> Sparse:
    masks, target = self._own(rule, sparse.masks), self._own(rule, sparse.target)
    return Sparse(masks, target, sparse.extra[rule.name])


def joined(params: Tree, one: Tree, other: Tree) -> Tree:
  """The leaves of two trees like `params`, `None` where neither has one."""
  found = tree.named(one) | tree.named(other)
  return tree.map_named(lambda path, _: found.get(path), params)


def owners(
  expressions: Mapping[str, tuple[str, ...]], paths: list[str]
) -> tuple[dict[str, frozenset[str]], tuple[str, ...]]:
  """The paths that each rule owns, and sentences on what rules leave to each other and what stays dense.

  Args:
    expressions: by rule, in their order: path expressions.
    paths: of all prunable parameters.

  Raises:
    UserError: a rule matches no path, or only paths of rules before it.
  """
  owner: dict[str, str] = {}
  notes = []
  for name, match in expressions.items():
    field = f'config.weight.rules.{name}.match'
    matched = [path for path in paths if tree.matches(match, path, field)]
    taken = {path: owner[path] for path in matched if path in owner}
    if len(taken) == len(matched):
      raise UserError(_owns_nothing(field, match, taken, paths))
    for earlier in dict.fromkeys(taken.values()):
      shared = [path for path, its in taken.items() if its == earlier]
      notes.append(
        f'the rules {earlier!r} and {name!r} both match {_listed(shared)}: {earlier!r}, which comes '
        'first, holds there'
      )
    owner |= {path: name for path in matched if path not in owner}
  if left := [path for path in paths if path not in owner]:
    notes.append(f'no rule matches {_listed(left)}: dense')
  owned = {name: frozenset(p for p in owner if owner[p] == name) for name in expressions}
  return owned, tuple(notes)


def _owns_nothing(
  field: str, match: tuple[str, ...], taken: Mapping[str, str], paths: list[str]
) -> str:
  if taken:
    earlier = ', '.join(dict.fromkeys(taken.values()))
    wrong = f'matches only what earlier rules ({earlier}) own, {_listed(list(taken))}'
  else:
    wrong = 'matches no prunable parameter'
  return f'{field}={match} {wrong}; there are: {", ".join(paths)}'


def _listed(paths: list[str]) -> str:
  more = len(paths) - SHOWN
  return ', '.join(paths[:SHOWN]) + (f' and {more} more' if more > 0 else '')


@contextlib.contextmanager
def fields_of(name: str) -> Iterator[None]:
  """Has UserErrors of the block name the fields of a rule, where they name those of `config.weight`."""
  try:
    yield
  except UserError as error:
    own = re.sub(
      r'config\.weight\.(?!dense|order|rules)', f'config.weight.rules.{name}.', str(error)
    )
    raise UserError(own) from error
