"""The plan of a model: its parameters, matmuls, units and sites, from one trace of its initialisation.

This works for any Linen module.
"""

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
  """The parameters, matmuls, gates, units, packable parameters and activation sites of a model.

  A module in a loop (`nn.scan`, `nn.vmap`) appears once, under its path. Its matmuls are charged for
  every iteration, and its units are counted over all iterations. Its parameters are stacked along
  leading axes and cannot be packed, because a packed format stores the matrices of a single iteration.

  Attributes:
    variables: all collections that outlive a call, as shape structs. Plans are shared, so these trees
      must not be changed in place.
    shapes: shape struct of every parameter, by path.
    kernels: shape, by path, of every parameter that has at least two axes in its module: a matrix or
      stacked matrices, without the axes that loops add.
    ledger: every matmul of a forward pass, in FLOPs per token.
    units: the units that span matrices, as modules declare them, followed by the layers.
    packable: paths of the parameters that their modules can read in packed form.
    fused: for the path of a fused linear layer, the layers that it can replace, in output order.
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
    """The site of each kernel's inputs, by the path of the kernel."""
    return {site.kernel: site for site in self.sites.values() if site.kernel is not None}


def read(
  init: Callable[[jax.Array], tuple[Tree, Tree]], tokens: int, sown: Collection[str] = ()
) -> ModelPlan:
  """Returns the plan of a Linen module.

  Args:
    init: the module's `init_with_output` for some inputs, as a function of a key.
    tokens: number of tokens of these inputs, by which FLOPs are divided.
    sown: collections that every call overwrites, which are not part of the variables.

  Raises:
    UserError: a parameter with at least two axes is missing in the ledger; the ledger names a parameter
      that does not exist; or a loop stacks units along an axis other than the leading one.
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
  """Returns an interceptor that records the shape of every parameter inside its own module.

  In a loop, the module's own call comes first, so the stacked shapes are not recorded.
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
  """Returns the group with the units of all iterations of the loops around it."""
  present = [member.path for member in group.members if member.path in shapes]
  loops = {_loops(shapes[path].shape, in_modules[path]) for path in present}
  if len(loops) > 1 or None in loops:
    path = present[0]
    raise UserError(
      f'the units of {group.name} cannot be identified: a loop stacks {path}{list(in_modules[path])} to '
      f'{list(shapes[path].shape)}, but must stack all parameters of the units along the leading axis; '
      "valid: variable_axes={'params': 0}"
    )
  passes = math.prod(*loops) if loops else 1
  return dataclasses.replace(group, units=group.units * passes)


def _loops(stacked: Shape, own: Shape) -> Shape | None:
  """Returns the sizes of the leading axes that loops add to a parameter; `None` for other axes."""
  lead = len(stacked) - len(own)
  return stacked[:lead] if stacked[lead:] == own else None


def _layers(paths: Collection[str]) -> list[Group]:
  """Returns the layers as a group of units; a unit contains all parameters of the layer's block."""
  places = {path: Place.parse(path) for path in paths}
  blocks = [(place.layer, path) for path, place in places.items() if place.part is Part.BLOCK]
  members = [Member(path, None, layer) for layer, path in sorted(blocks, key=lambda pair: pair[0])]
  return [Group('layer', '', members[-1].unit + 1, tuple(members))] if members else []


def check_accounted(kernels: Mapping[str, Shape], ledger: Ledger) -> None:
  """Raises a UserError if a kernel has no entry in the ledger, or an entry names an unknown kernel."""
  noted = {m.kernel for m in ledger.values()} - {None}
  missing = [path for path in kernels if path not in noted]
  if missing:
    raise UserError(
      f'no FLOPs are recorded for parameter {missing[0]}{list(kernels[missing[0]])} ({len(missing)} such '
      'parameters); valid: Linear of sparse_lm.layers.linear, or record.matmul on the product (0 FLOPs '
      'for a table lookup)'
    )
  if unknown_kernels := sorted(noted - kernels.keys()):
    raise UserError(
      f'FLOPs are recorded for {unknown_kernels[0]}, which is not a parameter of the model; valid: '
      f'{", ".join(kernels)}'
    )
