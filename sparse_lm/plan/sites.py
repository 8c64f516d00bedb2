"""Reads and replaces activations at named sites.

Modules declare sites with `record.site`, and `ModelPlan.sites` lists them. `run` calls a module and
reads or replaces activations; it can be traced, compiled, differentiated and mapped. A method can
replace activations of its inner modules with `replacing`. Unused sites cost nothing: the traced program
is the same as without them.
"""

import contextlib
import dataclasses
import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_lm.core import tree
from sparse_lm.core.errors import UserError, unknown
from sparse_lm.core.paths import Place
from sparse_lm.core.tree import Tree
from sparse_lm.plan import record
from sparse_lm.plan.cost import Gating

READ = 'sites'  # the collection that sites are sown into
Replacement = Callable[[jax.Array], jax.Array]
# The same, given the module of the site and the site's name in it.
ReplacementIn = Callable[[nn.Module, str, jax.Array], jax.Array]


def run(
  module: nn.Module,
  variables: Tree,
  *arguments: Tree,
  read: Iterable[str] = (),
  replace: Mapping[str, Replacement] | None = None,
  **keywords: Tree,
) -> tuple[Tree, dict[str, jax.Array]]:
  """Calls a module; reads and replaces activations at its sites.

  Names are those of `ModelPlan.sites`, or shell patterns such as 'block_*/mlp/hidden'. To compile the
  call, compile a function that calls `run`. Activations in a loop can be read if the loop declares it
  (`nn.scan(..., variable_axes={'sites': 0})`), and then have a leading axis for its iterations.
  Activations in a branch of a conditional (a routed layer in mode 'decode') cannot be read.

  Args:
    module: a model or a layer.
    variables: its variables.
    *arguments: positional arguments of its call.
    read: names of the sites to read. If a site is also replaced, its replacement is returned.
    replace: for each site, a function from its activations to new ones of the same shape and dtype.
    **keywords: keyword arguments of its call.

  Returns:
    The module's output, and the activations by site. If a module is called more than once, they are those
    of its last call.

  Raises:
    UserError: no site matches a name or pattern; a site is in a loop or conditional from which it
      cannot be read; or a replacement has another shape or dtype.
  """
  reader = _Reader(dict.fromkeys(read))
  replacer = _Replacer(dict(replace or {}))
  with record.acting(reader), record.acting(replacer):
    out, changed = module.apply(variables, *arguments, mutable=[READ], **keywords)
  for actor in (reader, replacer):
    _check_matched(actor)
  values = tree.named(changed.get(READ, {}))
  if missed := [name for name in reader.passed if reader.wants(name) and name not in values]:
    raise UserError(
      f'{missed[0]} ({len(missed)} such sites) is inside a loop that does not return activations; valid: '
      f'variable_axes={{{READ!r}: 0}} in its nn.scan'
    )
  return out, {name: values[name] for name in reader.passed if name in values}


@contextlib.contextmanager
def replacing(replace: Mapping[str, Replacement]) -> Iterator[None]:
  """Replaces activations in the calls of this context; `run` documents `replace`.

  Raises:
    UserError: at the end of the context, if no site matched a name or pattern.
  """
  replacer = _Replacer(dict(replace))
  with record.acting(replacer):
    yield
  _check_matched(replacer)


def acting(
  patterns: tuple[str, ...], function: ReplacementIn, gates: Gating | None = None
) -> contextlib.AbstractContextManager[None]:
  """Replaces floating-point activations at matching sites in the calls of this context.

  `gates` says which fraction of them is not set to zero.
  Patterns without a matching site are ignored; `check` reports them for a whole model.
  """
  return record.acting(
    _Method(dict.fromkeys(patterns), alike(patterns), function=function, gates=gates)
  )


def alike(patterns: tuple[str, ...]) -> bool:
  """Returns whether patterns match the same sites in every layer.

  That is the case if the part before the first slash, which contains the layer's number, has no digit and
  no wildcard that matches only some numbers.
  """
  return not any(re.search(r'[\d?[]', pattern.partition('/')[0]) for pattern in patterns)


def check(patterns: tuple[str, ...], found: Mapping[str, record.Site], field: str) -> None:
  """Raises a UserError that names `field` if a pattern matches no site of floating-point activations."""
  numbers = [path for path, site in found.items() if jnp.issubdtype(site.dtype, jnp.floating)]
  for pattern in patterns:
    if not any(_matches(pattern, path) for path in numbers):
      raise unknown(field, pattern, {str(Place.parse(path).in_any_layer) for path in numbers})


def _matches(pattern: str, path: str) -> bool:
  return fnmatch.fnmatchcase(path, pattern)


def _check_matched(actor: '_Matcher') -> None:
  for pattern in actor.patterns:
    if not any(_matches(pattern, path) for path in actor.passed):
      raise unknown('site', pattern, {str(Place.parse(path).in_any_layer) for path in actor.passed})


@dataclasses.dataclass(frozen=True)
class _Matcher(record.Actor):
  """An actor that acts on every site that matches one of its patterns.

  Attributes:
    patterns: names or patterns of sites, each with its replacement or `None`.
    alike: as in `record.Actor`.
    passed: names of all sites of the trace, in order.
  """

  patterns: Mapping[str, Replacement | None]
  alike: bool = False
  passed: dict[str, None] = dataclasses.field(default_factory=dict)

  def wants(self, path: str) -> bool:
    return any(_matches(pattern, path) for pattern in self.patterns)


class _Reader(_Matcher):
  """Sows the activations at its sites."""

  def act(
    self, module: nn.Module, name: str, path: str, value: jax.Array, branch: bool
  ) -> jax.Array:
    self.passed[path] = None
    if self.wants(path):
      if branch:
        raise UserError(
          f'{path} cannot be read in this mode, because a conditional decides whether its layer runs; '
          "valid: mode 'eval', which runs every layer"
        )
      module.sow(READ, name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)
    return value


class _Replacer(_Matcher):
  """Replaces activations with the function of the first pattern that matches their site."""

  def act(
    self, module: nn.Module, name: str, path: str, value: jax.Array, branch: bool
  ) -> jax.Array:
    self.passed[path] = None
    for pattern, function in self.patterns.items():
      if _matches(pattern, path):
        return _checked(path, value, function(value))
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Method(_Matcher):
  """Replaces floating-point activations at its sites by the result of one function.

  Attributes:
    function: returns the new activations.
    gates: as in `record.Actor`.
  """

  function: ReplacementIn
  gates: Gating | None = None

  def act(
    self, module: nn.Module, name: str, path: str, value: jax.Array, branch: bool
  ) -> jax.Array:
    self.passed[path] = None
    if not (self.wants(path) and jnp.issubdtype(value.dtype, jnp.floating)):
      return value
    return _checked(path, value, self.function(module, name, value))


def _checked(path: str, old: jax.Array, new: object) -> jax.Array:
  valid = f'{old.dtype}{list(old.shape)}'
  try:
    array = jnp.asarray(new)
  except (TypeError, ValueError, OverflowError) as error:
    kind = type(new).__name__
    raise UserError(f'{path}: the replacement is no array but {kind}; valid: {valid}') from error
  if (kind := f'{array.dtype}{list(array.shape)}') != valid:
    raise UserError(f'{path}: the replacement is {kind}; valid: {valid}')
  return array
