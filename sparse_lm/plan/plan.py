"""What a model is, read in one trace of its initialisation, for any Linen module."""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping

import jax
from flax import linen as nn

from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.core.groups import Group, Member
from sparse_lm.core.paths import Part, Place
from sparse_lm.core.tree import Tree
from sparse_lm.plan import executed, record
from sparse_lm.plan.cost import Ledger
from sparse_lm.plan.record import Site

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ModelPlan:
  """Parameters, matmuls and their gates, units, packable parameters and activation sites of a model.

  What a loop (`nn.scan`, `nn.vmap`) runs is in it once, by the path that the loop gives it: its matmuls
  are charged for every pass, its units are those of all passes, and its parameters, which the loop
  stacks along leading axes, cannot be packed, because a packed format stores the matrices of one pass.

  Attributes:
    variables: all collections that outlive a call, as shape structs. Plans are shared: change no tree of
      theirs in place.
    shapes: every parameter by its path, as shape structs.
    kernels: by path, the shape of every parameter that has two axes or more in its module: of a matrix,
      or of a stack of them, without the axes that loops add.
    ledger: every matmul of a forward pass, in FLOPs per token.
    units: that span matrices, as modules declare them, and then the layers.
    packable: paths of the parameters that their modules can read packed.
    fused: by the path of a linear layer, the layers that it can replace, in the order of their outputs.
    sites: points whose activations can be read or replaced, by name, in the order of the forward pass.
  """

  variables: Mapping[str, Tree]
  shapes: Mapping[str, jax.ShapeDtypeStruct]
  kernels: Mapping[str, Shape]
  ledger: Ledger
  units: tuple[Group, ...]
  packable: tuple[str, ...]
  fused: Mapping[str, tuple[str, ...]]
  sites: Mapping[str, Site]

  def __repr__(self) -> str:
    return f'ModelPlan({len(self.shapes)} parameters, {len(self.ledger)} matmuls)'

  @property
  def params(self) -> Tree:
    """The tree of all parameters, as shape structs."""
    return self.variables['params']

  @functools.cached_property
  def inputs(self) -> dict[str, Site]:
    """By the path of a kernel, the site of the activations that it multiplies."""
    return {site.kernel: site for site in self.sites.values() if site.kernel is not None}


def read(
  init: Callable[[jax.Array], tuple[Tree, Tree]], tokens: int, sown: Collection[str] = ()
) -> ModelPlan:
  """The plan of a Linen module.

  Args:
    init: from a key to the module's output and variables: its `init_with_output` for some inputs.
    tokens: of those inputs; FLOPs are divided by their number.
    sown: collections that every call writes anew, which are no part of the variables.

  Raises:
    UserError: a parameter of two axes or more has no place in the ledger, or the ledger names one that
      there is not; or a loop stacks units along another axis than the leading one.
  """
  called: dict[str, Shape] = {}
  with record.recording() as found, nn.intercept_methods(_noting(called)):
    key = jax.eval_shape(jax.random.key, 0)
    jaxpr, (_, variables) = jax.make_jaxpr(init, return_shape=True)(key)
  variables = {name: value for name, value in variables.items() if name not in sown}
  shapes = tree.named(variables['params'])
  in_modules = {path: called.get(path, leaf.shape) for path, leaf in shapes.items()}
  kernels = {path: shape for path, shape in in_modules.items() if len(shape) > 1}
  ledger = executed.charged(jaxpr).per_token(tokens).ledger
  check_accounted(kernels, ledger)
  stacked = {path for path, leaf in shapes.items() if leaf.shape != in_modules[path]}
  units = [_of_all_passes(group, shapes, in_modules) for group in found.units.values()]
  return ModelPlan(
    variables=variables,
    shapes=shapes,
    kernels=kernels,
    ledger=ledger,
    units=(*units, *_layers(shapes)),
    packable=tuple(path for path in found.packable if path in shapes and path not in stacked),
    fused={path: parts for path, parts in found.fused.items() if not _any_in(parts, stacked)},
    sites=found.sites,
  )


def _noting(shapes: dict[str, Shape]) -> Callable[..., Tree]:
  """An interceptor of calls that notes the shape of every parameter as its own module sees it.

  A module that a loop wraps is called inside of it first, and the loop's stacked arrays are seen later.
  """

  def intercept(
    call: Callable[..., Tree],
    arguments: tuple,
    keywords: dict,
    context: nn.module.InterceptorContext,
  ) -> Tree:
    out = call(*arguments, **keywords)
    if context.module.scope is not None:
      for name, leaf in context.module.variables.get('params', {}).items():
        if not isinstance(leaf, Mapping):
          shapes.setdefault('/'.join((*context.module.path, name)), leaf.shape)
    return out

  return intercept


def _any_in(layers: tuple[str, ...], parameters: set[str]) -> bool:
  places = [Place.parse(path) for path in parameters]
  return any(place.within(Place.parse(layer)) for layer in layers for place in places)


def _of_all_passes(
  group: Group, shapes: Mapping[str, jax.ShapeDtypeStruct], in_modules: Mapping[str, Shape]
) -> Group:
  """The units of a group in all passes of the loops around it."""
  present = [member.path for member in group.members if member.path in shapes]
  loops = {_loops(shapes[path].shape, in_modules[path]) for path in present}
  if len(loops) > 1 or None in loops:
    path = present[0]
    raise UserError(
      f'the units of {group.name} cannot be told apart: a loop stacks {path}{list(in_modules[path])} to '
      f'{list(shapes[path].shape)}, and not all of their parameters alike along leading axes; valid: '
      "variable_axes={'params': 0}"
    )
  passes = math.prod(*loops) if loops else 1
  return dataclasses.replace(group, units=group.units * passes)


def _loops(stacked: Shape, own: Shape) -> Shape | None:
  """The leading axes that loops add to a parameter; `None` where they add others."""
  lead = len(stacked) - len(own)
  return stacked[:lead] if stacked[lead:] == own else None


def _layers(paths: Collection[str]) -> list[Group]:
  """The layers as units, where there are any: each is whatever its block is made of."""
  places = {path: Place.parse(path) for path in paths}
  blocks = [(place.layer, path) for path, place in places.items() if place.part is Part.BLOCK]
  members = [Member(path, None, layer) for layer, path in sorted(blocks, key=lambda pair: pair[0])]
  return [Group('layer', '', members[-1].unit + 1, tuple(members))] if members else []


def check_accounted(kernels: Mapping[str, Shape], ledger: Ledger) -> None:
  """Raises UserError where a kernel is in no entry of a ledger, or an entry names what is no kernel."""
  noted = {m.kernel for m in ledger.values()} - {None}
  missing = [path for path in kernels if path not in noted]
  if missing:
    raise UserError(
      f'parameter {missing[0]}{list(kernels[missing[0]])} ({len(missing)} such) would multiply for '
      'free: no FLOPs are noted for it; valid: the Linear of sparse_lm.layers.linear, or record.matmul '
      'on the product (0 FLOPs for a table that is looked up)'
    )
  if unknown_kernels := sorted(noted - kernels.keys()):
    raise UserError(
      f'FLOPs are noted for {unknown_kernels[0]}, which is no parameter of the model; valid: '
      f'{", ".join(kernels)}'
    )
