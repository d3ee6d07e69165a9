"""Helpers for mesh axes, traced under `shard_map` on one device."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import specsamp_jax as ss
from specsamp_jax.sampling.cutoff import largest_logits, largest_threshold
from specsamp_jax.sampling.filters import make_filter
from specsamp_jax.sampling.mesh_axes import vary_like

pytestmark = pytest.mark.kernels

V = 300  # more than are sorted


def trace(fn, *arguments, in_specs):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    return jax.eval_shape(jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=P("x")), *arguments)


@pytest.mark.parametrize("varying", range(7))
def test_the_search_of_a_threshold_takes_arguments_that_vary_over_other_axes(varying):
    # Only types are needed: outside of a program, each loop of `largest_logits` would be compiled on its own.
    logits, row = jax.ShapeDtypeStruct((1, 2, V), jnp.float32), jax.ShapeDtypeStruct((1, 2), jnp.float32)
    active = jax.ShapeDtypeStruct((1, 2), bool)
    arguments = logits, jax.eval_shape(largest_logits, logits), row, row, row, row, active
    specs = tuple(P("x") if i == varying else P() for i in range(7))
    assert trace(largest_threshold, *arguments, in_specs=specs).shape == (1, 2)


@pytest.mark.parametrize(
    "sampling",
    [
        ss.SamplingParams(0.7, 200, 0.9),
        ss.SamplingParams(0.7, top_p=0.9, min_p=0.01),
        ss.SamplingParams(*(jnp.array(x) for x in (0.7, 200, 0.9, 0.01))),
    ],
    ids=["top_k", "top_p", "arrays"],
)
def test_a_filter_whose_parameters_are_on_all_devices(sampling):
    assert trace(lambda x: make_filter(x, sampling).cutoff, jnp.zeros((1, 2, V)), in_specs=P("x")).shape == (1, 2)


@pytest.mark.parametrize("target", [P(), P("x")])
def test_a_rule_whose_inputs_vary_over_other_axes(target):
    keys, target_logits = jax.random.split(jax.random.key(0), 1), jnp.zeros((1, 3, V))
    draft = ss.Draft(jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2, V)))
    other = P("x") if target == P() else P()
    result = trace(ss.verify, keys, target_logits, draft, in_specs=(P(), target, other))
    assert result.tokens.shape == (1, 3)


def test_arrays_vary_over_the_axes_of_others():
    def fn(varying, replicated):
        assert jax.typeof(replicated).manual_axis_type.varying == frozenset()
        assert jax.typeof(vary_like(replicated, (varying, replicated))).manual_axis_type.varying == {"x"}
        return vary_like((varying, replicated), varying)

    trace(fn, jnp.zeros(1), jnp.zeros(1), in_specs=(P("x"), P()))
