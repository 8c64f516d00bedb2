"""Paths of modules and parameters, read as places."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_lm.core.paths import Part, Place

names = st.lists(st.text('abk_0', min_size=1), max_size=4).map(tuple)


@given(names)
def test_a_place_converts_to_its_path_and_back(parts):
  place = Place(parts)
  assert Place.parse(str(place)) == place and str(place) == '/'.join(parts)
  assert Place(()) / '/'.join(parts) == place


@given(st.sampled_from(Part), st.integers(0, 120), names)
def test_a_place_knows_its_layer_and_its_part_of_it(part, layer, rest):
  assert part.value.endswith('_')
  place = Place.parse('/'.join((f'{part.value}{layer}', *rest)))
  assert (place.layer, place.part) == (layer, part)
  assert place.names[0] == part.of(layer)
  assert str(place.in_any_layer) == '/'.join((f'{part.value}*', *rest))


OUTSIDE = (
  '', 'embed/tokens', 'norm/scale', 'mlp/block_1/kernel', 'block_x', 'my_block_1/up', 'block_1a/up',
  'block', 'router_1/kernel',
)  # fmt: skip


@pytest.mark.parametrize('path', OUTSIDE)
def test_places_outside_the_layers_have_no_layer(path):
  place = Place.parse(path)
  assert place.layer is None and place.part is None and place.in_any_layer == place


@given(names, names)
def test_a_place_within_a_module_starts_with_its_path(outer, inner):
  assert Place(outer + inner).within(Place(outer))
  assert Place(outer).within(Place(outer + inner)) == (not inner)
  assert not Place.parse('block_10/mlp').within(Place.parse('block_1'))


@pytest.mark.parametrize(('kernel', 'bias'), [
  ('block_0/mlp/up/kernel', 'block_0/mlp/up/bias'),
  ('block_0/mlp/experts/up', 'block_0/mlp/experts/up_bias'),
  ('kernel', 'bias'),
])  # fmt: skip
def test_a_kernel_has_its_bias_beside_it(kernel, bias):
  place = Place.parse(kernel)
  assert str(place.bias) == bias
  assert place.bias.is_bias and not place.is_bias
  assert place.bias.module == place.module and place.module / place.name == place
