"""Records what modules declare while they are traced.

A module declares its matmuls and the gates that may skip them, the units that span its matrices, the
parameters that it can read in packed form, and its activation sites. Outside a recording, these calls do
nothing, and the traced program is the same as without them.
"""

import abc
import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from sparse_lm.core.groups import Group, Member
from sparse_lm.plan.cost import Gate, Gating, Matmul, Read


@dataclasses.dataclass(frozen=True)
class Mark:
  """The mark of an array that is the result of a matmul or of a read from a cache.

  Attributes:
    name: name of the ledger entry, or the reason why the FLOPs are not charged.
    noted: FLOPs or bytes of an array with `size` elements. Under `vmap`, the array is larger, and the
      costs grow in proportion.
    size: number of elements of the marked array.
    charged: whether the FLOPs belong to the ledger.
  """

  name: str
  noted: Matmul | Read
  size: int
  charged: bool = True


# All marks by their text, which is stored in the jaxpr. Functions that JAX has traced and cached earlier
# carry marks too, so entries are never removed.
MARKS: dict[str, Mark] = {}


@dataclasses.dataclass(frozen=True)
class Site:
  """A point of a model whose activations can be read or replaced by name.

  Attributes:
    name: path of the module plus the name of the point, such as 'block_0/mlp/hidden'.
    shape: shape of the activations in the recorded trace; in a loop, of one iteration.
    dtype: dtype of the activations.
    kernel: path of the parameter that the activations are multiplied by, or `None`.
  """

  name: str
  shape: tuple[int, ...]
  dtype: jax.numpy.dtype
  kernel: str | None = None


@dataclasses.dataclass(frozen=True)
class Recording:
  """The declarations of modules in a trace, except the marks in the jaxpr.

  Attributes:
    units: groups of units that span matrices, by name.
    packable: paths of parameters that a module can read in packed form.
    fused: for the path of a fused linear layer, the layers that it can replace, in output order.
    sites: activation sites by name.
  """

  units: dict[str, Group] = dataclasses.field(default_factory=dict)
  packable: dict[str, None] = dataclasses.field(default_factory=dict)
  fused: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  sites: dict[str, Site] = dataclasses.field(default_factory=dict)


class Actor(abc.ABC):
  """An object that reads or replaces activations at sites (`plan/sites.py`)."""

  @property
  def alike(self) -> bool:
    """Whether it acts on the same sites in every layer, so that layers can be scanned."""
    return False

  @property
  def gates(self) -> Gating | None:
    """Which fraction of the activations at its sites it keeps, if it sets the others to zero."""
    return None

  @abc.abstractmethod
  def wants(self, path: str) -> bool:
    """Returns whether it acts on the site of this name."""

  @abc.abstractmethod
  def act(
    self, module: nn.Module, name: str, path: str, value: jax.Array, branch: bool
  ) -> jax.Array:
    """Returns the activations that the model continues with.

    Args:
      module: the site's module.
      name: name of the site in the module.
      path: name of the site in the model.
      value: the current activations.
      branch: whether the site is in a branch of a conditional, from which activations cannot be read.
    """


@dataclasses.dataclass(frozen=True)
class _Scope:
  """The context at a point of a trace.

  Attributes:
    found: the current recording, or `None`.
    gates: the gates of the following matmuls, outermost first.
    actors: the actors on sites; the last one acts first.
    branch: whether the trace is in a branch of a conditional.
  """

  found: Recording | None = None
  gates: tuple[Gate, ...] = ()
  actors: tuple[Actor, ...] = ()
  branch: bool = False


_EMPTY = _Scope()
_scope: contextvars.ContextVar[_Scope] = contextvars.ContextVar('record', default=_EMPTY)


@contextlib.contextmanager
def _within(scope: _Scope) -> Iterator[None]:
  token = _scope.set(scope)
  try:
    yield
  finally:
    _scope.reset(token)


@contextlib.contextmanager
def recording() -> Iterator[Recording]:
  """Marks arrays and collects declarations in the traces of this context."""
  found = Recording()
  with _within(dataclasses.replace(_scope.get(), found=found)):
    yield found


def matmul(
  y: jax.Array,
  path: tuple[str, ...],
  kind: str,
  flops: float,
  kernel: str | None = None,
  causal: float = 1.0,
) -> jax.Array:
  """Returns `y`, the result of a matmul, marked with the matmul's cost.

  Outside a recording, `y` is returned unchanged. Every parameter with at least two axes must be recorded.
  Record a parameter that is looked up or added with zero FLOPs.

  Args:
    y: result of the matmul.
    path: path of the module.
    kind: 'linear', or another kind, such as 'scores'.
    flops: multiplications plus additions of the whole matmul.
    kernel: name of the parameter in the module; `None` if two activations are multiplied.
    causal: as in `cost.Matmul`.
  """
  parts = (*path, kind) if kernel in (None, 'kernel') else (*path, kernel, kind)
  parameter = None if kernel is None else '/'.join((*path, kernel))
  own = Matmul(kind, float(flops), parameter, _scope.get().gates, causal)
  return _mark(y, '/'.join(parts), own)


def uncharged(y: jax.Array, reason: str, flops: float) -> jax.Array:
  """Returns `y`, marked with FLOPs that are executed but not charged.

  Args:
    y: result of the computation.
    reason: the reason in a few words; the contract test lists uncharged FLOPs by reason.
    flops: multiplications plus additions.
  """
  return _mark(y, reason, Matmul('uncharged', float(flops)), charged=False)


def read(y: jax.Array, path: tuple[str, ...], kind: str, nbytes: float) -> jax.Array:
  """Returns `y`, marked with the bytes that decoding reads from the module's cache.

  Args:
    y: an array that depends on the read.
    path: path of the module.
    kind: what is read, such as 'keys'.
    nbytes: number of bytes.
  """
  return _mark(y, '/'.join((*path, kind)), Read(float(nbytes), _scope.get().gates))


def _mark(y: jax.Array, name: str, own: Matmul | Read, charged: bool = True) -> jax.Array:
  if _scope.get().found is None:
    return y
  mark = Mark(name, own, y.size, charged)
  MARKS[repr(mark)] = mark
  return checkpoint_name(y, repr(mark))


def gated(path: tuple[str, ...], gating: Gating | None) -> contextlib.AbstractContextManager[None]:
  """In this context, matmuls are charged at the open fraction of the gate at `path`; contexts nest.

  Args:
    path: path of the gate's module.
    gating: the gating in the module's traits; `None` if it gates nothing.
  """
  if gating is None:
    return contextlib.nullcontext()
  scope = _scope.get()
  gate = Gate(path='/'.join(path), **dataclasses.asdict(gating))
  return _within(dataclasses.replace(scope, gates=(*scope.gates, gate)))


def units(
  path: tuple[str, ...], kind: str, units: int, axes: Mapping[str, int], dynamic: bool = False
) -> None:
  """Declares a group of units that span several matrices of a module (`core.groups.Group`).

  Args:
    path: path of the module.
    kind: 'neuron', 'head', or another name of such a unit.
    units: number of units.
    axes: axis of the units in each parameter, by its path in the module (`{'up/kernel': -1}`).
    dynamic: whether a method selects among the units in every forward pass.
  """
  found = _scope.get().found
  if found is not None:
    members = tuple(Member('/'.join((*path, name)), axis) for name, axis in axes.items())
    group = Group(kind, '/'.join(path), units, members, dynamic)
    found.units[group.name] = group


def packable(path: tuple[str, ...], *names: str) -> None:
  """Declares that the module at `path` can read these parameters in packed form."""
  found = _scope.get().found
  if found is not None:
    found.packable.update(dict.fromkeys('/'.join((*path, name)) for name in names))


def fused(path: tuple[str, ...], name: str, parts: Iterable[str]) -> None:
  """Declares that one fused linear layer can replace several layers with the same inputs."""
  found = _scope.get().found
  if found is not None:
    found.fused['/'.join((*path, name))] = tuple('/'.join((*path, part)) for part in parts)


def site(module: nn.Module, name: str, value: jax.Array, kernel: str | None = None) -> jax.Array:
  """Declares an activation site; returns its activations or their replacement.

  Args:
    module: the site's module.
    name: name of the site in the module, such as 'hidden'.
    value: the activations, of any shape.
    kernel: path in the module of the parameter that `value` is multiplied by, or `None`.
  """
  scope = _scope.get()
  if scope.found is None and not scope.actors:
    return value
  path = '/'.join((*module.path, name))
  if scope.found is not None:
    parameter = None if kernel is None else '/'.join((*module.path, kernel))
    scope.found.sites[path] = Site(path, value.shape, value.dtype, parameter)
  for actor in reversed(scope.actors):
    value = actor.act(module, name, path, value, scope.branch)
  return value


def layers_alike() -> bool:
  """Returns whether equal layers may be scanned: no recording or actor needs each layer by itself."""
  scope = _scope.get()
  return scope.found is None and all(actor.alike for actor in scope.actors)


def hook(module: nn.Module, name: str) -> Callable[[jax.Array], jax.Array] | None:
  """Returns a site as a function of its value; `None` if nothing records the site or acts on it.

  Use this for activations that a fused kernel does not store. They must be computed only if the result is
  not `None`.
  """
  if _scope.get().found is None and not wanted(module, name):
    return None
  return lambda value: site(module, name, value)


def wanted(module: nn.Module, name: str) -> bool:
  """Returns whether an actor reads or replaces the activations at a site of a module."""
  path = '/'.join((*module.path, name))
  return any(actor.wants(path) for actor in _scope.get().actors)


def gating(module: nn.Module, name: str) -> Gating | None:
  """Returns which fraction of the activations at a site an actor keeps, so that others cost nothing."""
  path = '/'.join((*module.path, name))
  return next((a.gates for a in _scope.get().actors if a.gates and a.wants(path)), None)


def in_branch() -> contextlib.AbstractContextManager[None]:
  """Declares that modules in this context are called in a branch of a conditional."""
  return _within(dataclasses.replace(_scope.get(), branch=True))


@contextlib.contextmanager
def acting(actor: Actor) -> Iterator[None]:
  """Applies an actor to all sites in this context, after the actors of inner contexts."""
  scope = _scope.get()
  with _within(dataclasses.replace(scope, actors=(*scope.actors, actor))):
    yield
