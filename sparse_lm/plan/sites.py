"""Reading and replacing activations by the names of their sites.

Modules name points of a layer with `record.site`; `ModelPlan.sites` lists them. `run` calls a module,
reads sites and replaces what is there, as a function that can be traced, compiled, differentiated and
mapped. A method does the same to the modules inside of it with `replacing`. Sites that nobody acts on
cost nothing: the traced program is the same as without them.
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

READ = 'sites'  # the collection that sites are sown into
Replacement = Callable[[jax.Array], jax.Array]


def run(
  module: nn.Module,
  variables: Tree,
  *arguments: Tree,
  read: Iterable[str] = (),
  replace: Mapping[str, Replacement] | None = None,
  **keywords: Tree,
) -> tuple[Tree, dict[str, jax.Array]]:
  """What a module returns, and the activations at sites of it.

  Names are those of `ModelPlan.sites`, or shell patterns such as 'block_*/mlp/hidden'. To compile it,
  compile a function that calls this. Activations inside of a loop are read where the loop says so
  (`nn.scan(..., variable_axes={'sites': 0})`), with an axis for its passes; those in a branch of a
  conditional (a routed layer in mode 'decode') cannot be read.

  Args:
    module: a model, or a layer of one.
    variables: of the module.
    arguments, keywords: of its call.
    read: sites to return; where they are replaced too, what they are replaced by.
    replace: by the name of the site, what its activations become: of the same shape and dtype.

  Returns:
    The module's output, and activations by the name of the site. Of a module that is called more than
    once they are those of its last call.

  Raises:
    UserError: a name or pattern that no site has, a site whose value no loop or conditional hands out, or
      a replacement of another shape or dtype.
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
      f'{missed[0]} ({len(missed)} such sites) is inside of a loop that hands no activations out; valid: '
      f'variable_axes={{{READ!r}: 0}} of that nn.scan'
    )
  return out, {name: values[name] for name in reader.passed if name in values}


@contextlib.contextmanager
def replacing(replace: Mapping[str, Replacement]) -> Iterator[None]:
  """Replaces activations in the calls inside, by name or pattern, see `run`.

  Raises UserError, on the way out, for a name or pattern that no site inside has.
  """
  replacer = _Replacer(dict(replace))
  with record.acting(replacer):
    yield
  _check_matched(replacer)


def acting(
  patterns: tuple[str, ...], function: Replacement
) -> contextlib.AbstractContextManager[None]:
  """Replaces floating-point activations in the calls inside, at the sites that patterns match.

  The calls may lack sites: whether a whole model has them, `check` says.
  """

  def replace(value: jax.Array) -> jax.Array:
    return function(value) if jnp.issubdtype(value.dtype, jnp.floating) else value

  return record.acting(_Replacer(dict.fromkeys(patterns, replace), alike=alike(patterns)))


def alike(patterns: tuple[str, ...]) -> bool:
  """Whether patterns match the same sites in every layer.

  That is so if nothing before the first slash, where a layer's number stands, matches some numbers alone.
  """
  return not any(re.search(r'[\d?[]', pattern.partition('/')[0]) for pattern in patterns)


def check(patterns: tuple[str, ...], found: Mapping[str, record.Site], field: str) -> None:
  """Raises UserError, naming `field`, for a pattern that no site of floating-point activations has."""
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
  """Acts on the sites that one of its patterns matches.

  Attributes:
    patterns: by which sites are wanted, and for each what they are replaced by, if they are.
    alike: see `record.Actor`.
    passed: names of all sites of the trace, in their order.
  """

  patterns: Mapping[str, Replacement | None]
  alike: bool = False
  passed: dict[str, None] = dataclasses.field(default_factory=dict)

  def wants(self, path: str) -> bool:
    return any(_matches(pattern, path) for pattern in self.patterns)


class _Reader(_Matcher):
  """Sows the activations that it wants."""

  def act(
    self, module: nn.Module, name: str, path: str, value: jax.Array, branch: bool
  ) -> jax.Array:
    self.passed[path] = None
    if self.wants(path):
      if branch:
        raise UserError(
          f'{path} cannot be read where a conditional decides whether its layer runs; valid: mode '
          "'eval', which runs every layer"
        )
      module.sow(READ, name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)
    return value


class _Replacer(_Matcher):
  """Replaces activations, by the first pattern that their site matches."""

  def act(
    self, module: nn.Module, name: str, path: str, value: jax.Array, branch: bool
  ) -> jax.Array:
    self.passed[path] = None
    for pattern, function in self.patterns.items():
      if _matches(pattern, path):
        return _checked(path, value, jnp.asarray(function(value)))
    return value


def _checked(path: str, old: jax.Array, new: jax.Array) -> jax.Array:
  kinds = [f'{a.dtype}{list(a.shape)}' for a in (new, old)]
  if kinds[0] != kinds[1]:
    raise UserError(f'{path} is replaced by {kinds[0]}; valid: {kinds[1]}')
  return new
