"""What modules say about themselves while they are traced: one recorder for all of it.

A module notes its matmuls and what may skip them, the units that span its matrices, the parameters that
it can read packed, and its activation sites. Outside of a recording no call here does anything: the
traced program is the same as without it.
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
  """What the result of a matmul, or what is read of a cache, is marked with.

  Attributes:
    name: of the entry in the ledger, or the reason why the FLOPs are not charged.
    noted: with its FLOPs or bytes for one array of `size` elements: under `vmap` there are more.
    charged: whether FLOPs belong to the ledger.
  """

  name: str
  noted: Matmul | Read
  size: int
  charged: bool = True


# By the text that marks an array: equal marks share it, so a function that JAX traced once and cached
# carries marks that stay readable.
MARKS: dict[str, Mark] = {}


@dataclasses.dataclass(frozen=True)
class Site:
  """A point of a model whose activations can be read or replaced by name.

  Attributes:
    name: path of the module and the point in it, such as 'block_0/mlp/hidden'.
    shape: of the activations in the trace that recorded it; inside of a loop, of one pass.
    dtype: of the activations.
    kernel: path of the parameter that multiplies them, for the input of a matrix; else `None`.
  """

  name: str
  shape: tuple[int, ...]
  dtype: jax.numpy.dtype
  kernel: str | None = None


@dataclasses.dataclass(frozen=True)
class Recording:
  """What modules declare in a trace, besides the marks that `plan/executed.py` reads in its jaxpr.

  Attributes:
    units: that span matrices, by name.
    packable: paths of parameters that a module takes packed, if it has them.
    fused: by the path of a linear layer, the layers that it can replace, in the order of their outputs.
    sites: by name.
  """

  units: dict[str, Group] = dataclasses.field(default_factory=dict)
  packable: dict[str, None] = dataclasses.field(default_factory=dict)
  fused: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  sites: dict[str, Site] = dataclasses.field(default_factory=dict)


class Actor(abc.ABC):
  """What reads or replaces activations at sites; see `plan/sites.py`."""

  @property
  def alike(self) -> bool:
    """Whether it acts on the same sites in every layer, so that one layer may be traced for several."""
    return False

  @abc.abstractmethod
  def wants(self, path: str) -> bool:
    """Whether it acts on the site of that name."""

  @abc.abstractmethod
  def act(
    self, module: nn.Module, name: str, path: str, value: jax.Array, branch: bool
  ) -> jax.Array:
    """The activations that the model goes on with.

    Args:
      module: the site's module.
      name: of the site in the module.
      path: of the site in the model.
      value: the activations so far.
      branch: whether the site is in a branch of a conditional, which hands no activations out.
    """


@dataclasses.dataclass(frozen=True)
class _Scope:
  """What holds at a point of a trace.

  Attributes:
    found: the recording, if there is one.
    gates: that may skip what follows, outermost first.
    actors: that see sites, the last one first.
    branch: whether this is in a branch of a conditional, which hands no activations out.
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
  """Marks arrays, and collects what is declared, in the traces inside."""
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
  """Returns `y`, the result of a matmul of the module at `path`, marked with the matmul's cost.

  Unless a trace is recorded `y` is returned as it is. A parameter that is looked up or added, not
  multiplied, is noted with zero FLOPs, because a parameter of two axes or more that no note names is
  refused.

  Args:
    kind: 'linear', or what else ran ('scores').
    flops: multiplications and additions of the whole matmul.
    kernel: name of the parameter in the module, `None` for activations with activations.
    causal: see `cost.Matmul`.
  """
  parts = (*path, kind) if kernel in (None, 'kernel') else (*path, kernel, kind)
  parameter = None if kernel is None else '/'.join((*path, kernel))
  own = Matmul(kind, float(flops), parameter, _scope.get().gates, causal)
  return _mark(y, '/'.join(parts), own)


def uncharged(y: jax.Array, reason: str, flops: float) -> jax.Array:
  """Returns `y`, marked with FLOPs that its computation executes and that are charged to nobody.

  Args:
    reason: why they are not, in a few words; the contract test lists FLOPs by reason.
    flops: multiplications and additions.
  """
  return _mark(y, reason, Matmul('uncharged', float(flops)), charged=False)


def read(y: jax.Array, path: tuple[str, ...], kind: str, nbytes: float) -> jax.Array:
  """Returns `y`, marked with bytes that decoding reads of what the module at `path` keeps.

  Args:
    kind: what they are ('keys').
  """
  return _mark(y, '/'.join((*path, kind)), Read(float(nbytes), _scope.get().gates))


def _mark(y: jax.Array, name: str, own: Matmul | Read, charged: bool = True) -> jax.Array:
  if _scope.get().found is None:
    return y
  mark = Mark(name, own, y.size, charged)
  MARKS[repr(mark)] = mark
  return checkpoint_name(y, repr(mark))


def gated(path: tuple[str, ...], gating: Gating | None) -> contextlib.AbstractContextManager[None]:
  """Matmuls inside belong to the gate at `path`, and to the gates that are entered already.

  Args:
    path: of the module that decides.
    gating: what that module declares, `None` where it leaves nothing out.
  """
  if gating is None:
    return contextlib.nullcontext()
  scope = _scope.get()
  gate = Gate(path='/'.join(path), **dataclasses.asdict(gating))
  return _within(dataclasses.replace(scope, gates=(*scope.gates, gate)))


def units(
  path: tuple[str, ...], kind: str, units: int, axes: Mapping[str, int], dynamic: bool = False
) -> None:
  """Declares units that span several matrices of the module at `path`: a `core.groups.Group`.

  Args:
    kind: 'neuron', 'head', or another name for one unit.
    units: how many there are.
    axes: the axis of each parameter, by its path below the module (`{'up/kernel': -1}`).
    dynamic: whether a method selects among them in every forward pass.
  """
  found = _scope.get().found
  if found is not None:
    members = tuple(Member('/'.join((*path, name)), axis) for name, axis in axes.items())
    group = Group(kind, '/'.join(path), units, members, dynamic)
    found.units[group.name] = group


def packable(path: tuple[str, ...], *names: str) -> None:
  """Says that the module at `path` takes these parameters packed, if it has them."""
  found = _scope.get().found
  if found is not None:
    found.packable.update(dict.fromkeys('/'.join((*path, name)) for name in names))


def fused(path: tuple[str, ...], name: str, parts: Iterable[str]) -> None:
  """Says that the module at `path` takes one linear layer in place of several of the same inputs."""
  found = _scope.get().found
  if found is not None:
    found.fused['/'.join((*path, name))] = tuple('/'.join((*path, part)) for part in parts)


def site(module: nn.Module, name: str, value: jax.Array, kernel: str | None = None) -> jax.Array:
  """Returns the activations at a named point of a module, or what they are replaced by.

  Outside of a recording and of `acting` this is `value`.

  Args:
    module: the point's module.
    name: of the point in the module, such as 'hidden'.
    value: of any shape.
    kernel: path below the module of the parameter that multiplies the value, if one does.
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
  """Whether one layer may be traced for several equal ones: no recording or actor needs single layers."""
  scope = _scope.get()
  return scope.found is None and all(actor.alike for actor in scope.actors)


def hook(module: nn.Module, name: str) -> Callable[[jax.Array], jax.Array] | None:
  """The site as a function of its value, or `None` where nothing records it or acts on it.

  For activations that a fused kernel does not write out: a caller that gets a function must compute them.
  """
  if _scope.get().found is None and not wanted(module, name):
    return None
  return lambda value: site(module, name, value)


def wanted(module: nn.Module, name: str) -> bool:
  """Whether something reads or replaces the activations at a named point of a module."""
  path = '/'.join((*module.path, name))
  return any(actor.wants(path) for actor in _scope.get().actors)


def in_branch() -> contextlib.AbstractContextManager[None]:
  """Modules inside are called in branches of a conditional."""
  return _within(dataclasses.replace(_scope.get(), branch=True))


@contextlib.contextmanager
def acting(actor: Actor) -> Iterator[None]:
  """The actor sees the sites of the traces inside, after the actors that are entered later."""
  scope = _scope.get()
  with _within(dataclasses.replace(scope, actors=(*scope.actors, actor))):
    yield
