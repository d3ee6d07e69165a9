"""Programs compiled from shapes are those that `generate` and `stream` run."""

import dataclasses

import jax
import numpy as np
import pytest
import tables

import specsamp_jax as ss
from specsamp_jax.decoding import costs
from specsamp_jax.decoding.ahead import compile_generate, compile_stream

pytestmark = pytest.mark.optimised(False)

PROMPT = np.array([[1, 2, 3], [2, 0, 0]], np.int32)
PROGRAMS = {compile_generate: ["_generate"], compile_stream: ["_init", "_advance", "_text"]}


def run(compile_fn, **options):
    key = jax.random.key(0)
    if compile_fn is compile_generate:
        return ss.generate(key, PROMPT, **options)
    return list(ss.stream(key, PROMPT, **options))[-1]


def compiled(caplog):
    messages = [record.getMessage() for record in caplog.records]
    caplog.clear()
    names = {name for names in PROGRAMS.values() for name in names}
    return [name for name in sorted(names) if any(f"Compiling jit({name})" in message for message in messages)]


@pytest.mark.parametrize("compile_fn", PROGRAMS)
def test_a_program_compiled_from_shapes_is_not_compiled_again(compile_fn, caplog):
    model = tables.model(tables.table(0))
    shapes = dataclasses.replace(model, params=jax.ShapeDtypeStruct(model.params.shape, model.params.dtype))
    options = {"draft": ss.NGramDrafter(), "prompt_lengths": np.array([3, 1], np.int32), "max_new_tokens": 5}
    options |= {"num_draft": 1, "sampling": ss.SamplingParams(0.0)}
    with jax.log_compiles():
        compile_fn(PROMPT, target=shapes, **options)
        assert compiled(caplog) == sorted(PROGRAMS[compile_fn])
        result = run(compile_fn, target=model, **options)
        assert compiled(caplog) == []
    expected = run(compile_generate, target=model, **options)
    np.testing.assert_array_equal(result.tokens, expected.tokens)


@pytest.mark.parametrize(("compile_fn", "decode_fn"), [(compile_generate, ss.generate), (compile_stream, ss.stream)])
def test_measuring_compiles_nothing_that_was_not_compiled_before_the_weights_were_read(
    compile_fn, decode_fn, caplog, monkeypatch
):
    monkeypatch.setattr(costs, "_SECONDS", 0.0)
    monkeypatch.setattr(costs, "_TEXT_SECONDS", 0.1)
    lengths = (0, 7)  # no other test has arrays of this size, which a small program would make
    options = {"target": tables.model(tables.table(0)), "draft": ss.NGramDrafter(), "max_new_tokens": 9}
    compile_fn(PROMPT, num_draft=costs.forced(lengths, 0), **options)
    with jax.log_compiles():
        ss.measure_goodput(PROMPT, lengths=lengths, decode_fn=decode_fn, **options)
    assert [record.getMessage() for record in caplog.records if "Compiling" in record.getMessage()] == []


def test_a_program_compiled_from_shapes_has_no_source_locations_on_a_cpu(monkeypatch):
    compile_fn, programs = jax.stages.Lowered.compile, []

    def compile_and_keep(lowered):
        programs.append(lowered.as_text(debug_info=True))
        return compile_fn(lowered)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_and_keep)
    compile_generate(PROMPT, target=tables.model(tables.table(0)), draft=None, max_new_tokens=3)
    assert ("generate.py" in programs[-1]) == (jax.default_backend() != "cpu")
