"""examples/serving.py: each request's text is the text it would have alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import serving

import specsamp_jax as ss

pytestmark = pytest.mark.optimised(False)

VOCAB_SIZE, MAX_PROMPT, MAX_NEW_TOKENS = 13, 4, 6


def bigrams(seed):
    table = jax.random.normal(jax.random.key(seed), (VOCAB_SIZE, VOCAB_SIZE))
    return ss.Model(table, lambda table, tokens, positions, cache: (table[tokens], cache), lambda batch, length: ())


def test_each_request_has_the_text_it_would_have_alone():
    target, draft = bigrams(0), bigrams(1)
    requests = [
        serving.Request([3], seed=7, max_new_tokens=6),
        serving.Request([1, 2, 3, 4], seed=8, max_new_tokens=1),
        serving.Request([5, 6], seed=9, max_new_tokens=4),
        serving.Request([5, 6], seed=10, max_new_tokens=6),
        serving.Request([12, 0], seed=11, max_new_tokens=2),
    ]
    models = {"target": target, "draft": draft, "num_draft": 2, "eos_token": 0}
    sizes = {"max_prompt": MAX_PROMPT, "max_new_tokens": MAX_NEW_TOKENS}
    served = dict(serving.serve(iter(requests), num_rows=2, **sizes, **models))
    assert served.keys() == set(range(len(requests)))
    # Alone, in one shape for all requests, and cut to each request's own limit.
    for index, request in enumerate(requests):
        length = len(request.prompt)
        text = ss.generate(
            jax.vmap(jax.random.key)(jnp.array([request.seed], jnp.uint32)),
            np.pad(request.prompt, (0, MAX_PROMPT - length))[None],
            prompt_lengths=np.array([length]),
            max_new_tokens=MAX_NEW_TOKENS,
            **models,
        )
        end = min(int(text.lengths[0]), length + request.max_new_tokens)
        assert served[index] == text.tokens[0, :end].tolist()


def test_no_requests():
    models = {"target": bigrams(0), "draft": bigrams(1)}
    assert list(serving.serve([], num_rows=2, max_prompt=2, max_new_tokens=2, **models)) == []


def test_the_example_runs(capsys, one_layer_pair):
    serving.main()
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split(":")[0] for line in lines) == list("012345")
