"""Rules: several weight methods in one model, each for its own parameters.

A parameter belongs to the first rule with an expression that matches its path. The sparsity of a rule
counts the prunable weights of that rule. So two rules of 50 % drop 50 % of the model's prunable weights,
or less if some of them belong to no rule.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from sparse_lm.core import tree
from sparse_lm.core.errors import UserError, listed
from sparse_lm.core.tree import Tree
from sparse_lm.weights.method import Array, MaskUpdate, Sparse, WeightMethod
from sparse_lm.weights.traits import Traits

SHOWN = 3  # number of paths that a message lists; it counts the others


@dataclasses.dataclass(frozen=True)
class Rule:
  """A weight method and its parameters.

  Attributes:
    name: name of the rule in the config.
    method: the weight method.
    paths: paths of the parameters that belong to the rule.
  """

  name: str
  method: WeightMethod
  paths: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Rules(WeightMethod):
  """Several weight methods in one model.

  The learned parameters of each method are in `trainable['learned']`, its other state in `sparse.extra`,
  both by the name of the rule. Random numbers depend on the paths of parameters, so a rule draws the same
  numbers as its method alone. If a method's update replaces an optimizer step, it does so for the
  parameters of its rule only: all other parameters, and the optimizer's step count, advance. If a model
  has a single rule, its update replaces the whole step.

  Attributes:
    rules: the rules in their order.
    notes: sentences about parameters that several rules match, or none.
  """

  rules: tuple[Rule, ...] = ()
  notes: tuple[str, ...] = ()

  @property
  def parts(self) -> dict[str, WeightMethod]:
    """The method of each rule."""
    return {rule.name: rule.method for rule in self.rules}

  def with_parts(self, parts: Mapping[str, WeightMethod]) -> 'Rules':
    """Returns the same rules with other methods; `parts` has the method of each rule by its name."""
    rules = tuple(dataclasses.replace(rule, method=parts[rule.name]) for rule in self.rules)
    return dataclasses.replace(self, rules=rules)

  @functools.cached_property
  def _owners(self) -> dict[str, str]:
    return {path: rule.name for rule in self.rules for path in rule.paths}

  def owner(self, path: str) -> str | None:
    """Returns the name of the rule that the parameter belongs to."""
    return self._owners.get(path)

  @property
  def traits(self) -> Traits:
    """The combined traits of all methods."""
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
    """True if all methods also prune trained models."""
    return all(rule.method.one_shot for rule in self.rules)

  @property
  def learned_rates(self) -> dict[str, float]:
    """The rates of each method, by paths that begin with the name of the rule."""
    return {
      f'{rule.name}/{start}': rate
      for rule in self.rules
      for start, rate in rule.method.learned_rates.items()
    }

  def resting(self, updates: tuple[str, ...], trainable: Tree) -> Tree:
    """Marks the leaves of rules whose update replaces an optimizer step."""
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
    """Raises UserError, naming the rule's field, if a method cannot prune a trained model."""
    for rule in self.rules:
      with fields_of(rule.name):
        rule.method.check_one_shot()

  def init(self, key: Array, params: Tree, target: Tree) -> tuple[Tree, Sparse]:
    """Initialises all methods, one after the other."""
    learned, extra, masks = {}, {}, jax.tree.map(lambda _: None, params)
    for rule in self.rules:
      trainable, sparse = rule.method.init(key, params, self._own(rule, target))
      params, learned[rule.name] = trainable['params'], trainable['learned']
      masks, extra[rule.name] = joined(params, masks, sparse.masks), sparse.extra
    return {'params': params, 'learned': learned}, Sparse(masks, target, extra)

  def effective(
    self, trainable: Tree, sparse: Sparse, mode: str, step: Array, key: Array | None
  ) -> tuple[Tree, Tree]:
    """Returns the parameters that the model uses, each from its own method, and all densities."""
    params, density = trainable['params'], jax.tree.map(lambda _: None, trainable['params'])
    for rule in self.rules:
      params, own = rule.method.effective(
        *self._state(rule, trainable, params, sparse), mode, step, key
      )
      density = joined(params, density, own)
    return params, density

  def penalty(self, trainable: Tree, sparse: Sparse, density: Tree) -> Array:
    """Returns the sum of the methods' penalties, each for its own weights."""
    found = (
      rule.method.penalty(
        *self._state(rule, trainable, trainable['params'], sparse), self._own(rule, density)
      )
      for rule in self.rules
    )
    return sum(found, jnp.float32(0))

  def frozen(self, sparse: Sparse) -> Tree:
    """Marks the weights that the methods freeze, each among its own weights."""
    frozen = super().frozen(sparse)
    for rule in self.rules:
      own = rule.method.frozen(self._own_sparse(rule, sparse))
      frozen = joined(sparse.target, frozen, own)
    return frozen

  def rate_factor(self, target: Tree, step: Array) -> Array | None:
    """Returns the smallest factor of all methods, or `None` if no method has one."""
    found = [rule.method.rate_factor(self._own(rule, target), step) for rule in self.rules]
    found = [factor for factor in found if factor is not None]
    return functools.reduce(jnp.minimum, found) if found else None

  def constrain(self, trainable: Tree, sparse: Sparse) -> Tree:
    """Applies each method's constraint to its own weights."""
    params, learned = trainable['params'], {}
    for rule in self.rules:
      own = rule.method.constrain(*self._state(rule, trainable, params, sparse))
      params, learned[rule.name] = own['params'], own['learned']
    return trainable | {'params': params, 'learned': learned}

  def due(self, step: int) -> bool:
    """True if any method updates its masks in this step."""
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
    """Updates the masks of these rules, one after the other; other masks do not change."""
    params, learned = trainable['params'], dict(trainable['learned'])
    masks, extra = sparse.masks, dict(sparse.extra)
    toggled, non_finite = jax.tree.map(lambda _: None, params), {}
    for rule in self.rules:
      if rule.name not in updates:
        continue
      own = self._state(rule, trainable, params, sparse)
      change = rule.method.update(*own, signals[rule.name], step, key)
      params, learned[rule.name] = change.trainable['params'], change.trainable['learned']
      masks, extra[rule.name] = tree.merge(masks, change.sparse.masks), change.sparse.extra
      toggled = joined(params, toggled, change.toggled)
      non_finite |= change.non_finite
    new = Sparse(masks, sparse.target, extra)
    return MaskUpdate(trainable | {'params': params, 'learned': learned}, new, toggled, non_finite)

  def non_finite(self, trainable: Tree, sparse: Sparse, step: Array) -> dict[str, Array]:
    """Returns the flags of all methods, each for its own weights."""
    found = {}
    for rule in self.rules:
      own = self._state(rule, trainable, trainable['params'], sparse)
      found |= rule.method.non_finite(*own, step)
    return found

  def finalize(self, trainable: Tree, sparse: Sparse, step: Array) -> tuple[Tree, Tree]:
    """Returns final parameters and masks, each from its own method."""
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
    """Returns the trainable tree and the state of one rule's method."""
    own = {'params': params, 'learned': trainable['learned'][rule.name]}
    return own, self._own_sparse(rule, sparse)

  def _own_sparse(self, rule: Rule, sparse: Sparse) -> Sparse:
    masks, target = self._own(rule, sparse.masks), self._own(rule, sparse.target)
    return Sparse(masks, target, sparse.extra[rule.name])


def joined(params: Tree, one: Tree, other: Tree) -> Tree:
  """Merges the leaves of two trees like `params`; `None` if neither has a leaf."""
  found = tree.named(one) | tree.named(other)
  return tree.map_named(lambda path, _: found.get(path), params)


def owners(
  expressions: Mapping[str, tuple[str, ...]], paths: list[str]
) -> tuple[dict[str, frozenset[str]], tuple[str, ...]]:
  """Returns the paths of each rule, and sentences about paths that several rules match, or none.

  Args:
    expressions: path expressions by the name of the rule, in the order of the rules.
    paths: paths of all prunable parameters.

  Raises:
    UserError: a rule matches no path, or only paths that belong to rules before it.
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
        f'the rules {earlier!r} and {name!r} both match {_listed(shared)}; the first of them, '
        f'{earlier!r}, applies'
      )
    owner |= {path: name for path in matched if path not in owner}
  if left := [path for path in paths if path not in owner]:
    notes.append(f'no rule matches {_listed(left)}; they stay dense')
  owned = {name: frozenset(p for p in owner if owner[p] == name) for name in expressions}
  return owned, tuple(notes)


def _owns_nothing(
  field: str, match: tuple[str, ...], taken: Mapping[str, str], paths: list[str]
) -> str:
  if taken:
    earlier = ', '.join(dict.fromkeys(taken.values()))
    wrong = f'matches only parameters of earlier rules ({earlier}): {_listed(list(taken))}'
  else:
    wrong = 'matches no prunable parameter'
  return f'{field}={match} {wrong}; prunable parameters: {listed(paths, "".join(match))}'


def _listed(paths: list[str]) -> str:
  more = len(paths) - SHOWN
  return ', '.join(paths[:SHOWN]) + (f' and {more} more' if more > 0 else '')


@contextlib.contextmanager
def fields_of(name: str) -> Iterator[None]:
  """Makes UserErrors of the block name the fields of a rule instead of those of `config.weight`."""
  try:
    yield
  except UserError as error:
    own = re.sub(
      r'config\.weight\.(?!dense|order|rules)', f'config.weight.rules.{name}.', str(error)
    )
    raise UserError(own) from error
