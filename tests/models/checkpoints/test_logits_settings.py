"""Settings of generation_config.json that change logits: which are read, and texts equal to those of transformers."""

import functools
import json
import os
import re
import subprocess
from pathlib import Path

import fixture_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inputs import quick_jit

import specsamp_jax as ss
from specsamp_jax.decoding import processors, truncation
from specsamp_jax.models import LogitsSettings, load_checkpoint, load_generation_config, sampling_and_processor

ROOT = Path(__file__).parents[3]
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"  # made by bench/peers/make_env.sh
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
REAL = CACHE / "specsamp" / "real" / "smollm2"
GREEDY = ss.SamplingParams(temperature=0.0)
# As published with Qwen2.5-7B-Instruct and SmolLM2-135M-Instruct.
QWEN25 = {
    "bos_token_id": 151643,
    "pad_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "transformers_version": "4.37.0",
}
SMOLLM2 = {
    "_from_model_config": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "transformers_version": "4.42.3",
}


def write(folder, vocab_size=61, **values):
    (folder / "config.json").write_text(json.dumps({"vocab_size": vocab_size}))
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


def test_published_files_load(tmp_path):
    qwen = load_generation_config(write(tmp_path, 152064, **QWEN25))
    assert qwen.eos_token == (151645, 151643)
    sampling, process = sampling_and_processor(qwen, [4, 2])
    assert sampling == ss.SamplingParams(0.7, 20, 0.8, 0.0)
    assert process == processors.Chain((processors.RepetitionPenalty(1.05),))
    smollm = load_generation_config(write(tmp_path, 49152, **SMOLLM2))
    assert (smollm.eos_token, smollm.logits) == ((2,), LogitsSettings())
    assert sampling_and_processor(smollm, [4]) == (GREEDY, None)


def speculate(prompts, lengths, target, process, eos_token, max_new_tokens):
    return ss.generate(
        jax.random.key(0),
        prompts,
        prompt_lengths=lengths,
        target=target,
        draft=ss.NGramDrafter(),
        num_draft=3,
        max_new_tokens=max_new_tokens,
        sampling=GREEDY,
        eos_token=eos_token,
        process_logits_fn=process,
    )


def config_of_case(tmp_path, case):
    made = fixture_files.values("settings.json")
    values = made["cases"][case]["settings"]
    return load_generation_config(write(tmp_path, eos_token_id=made["eos_token_id"], **values))


@functools.cache
def target():
    return load_checkpoint(fixture_files.FIXTURES / fixture_files.values("settings.json")["model"])


@quick_jit
def all_logits(model, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return model.apply_fn(model.params, tokens, positions, model.init_cache_fn(*tokens.shape))[0]


@pytest.mark.parametrize("case", range(11))
def test_each_token_equals_that_of_transformers(tmp_path, case):
    """The most probable token after each prefix of the texts, padded with tokens that would change the penalties."""
    made = fixture_files.values("settings.json")
    config = config_of_case(tmp_path, case)
    wholes = [prompt + text for prompt, text in zip(made["prompts"], made["cases"][case]["texts"], strict=True)]
    padded = np.array([(whole + 40 * [whole[-1]])[:40] for whole in wholes])
    logits = all_logits(target(), padded)
    rows, ends = zip(
        *((row, end) for row, whole in enumerate(wholes) for end in range(len(made["prompts"][row]), len(whole))),
        strict=True,
    )
    # One shape for all cases.
    rows, ends = (np.pad(np.array(each), (0, 72 - len(each)), mode="edge") for each in (rows, ends))
    lengths = np.array([len(made["prompts"][row]) for row in rows])
    sampling, process = sampling_and_processor(config, lengths)
    assert sampling == GREEDY
    last = logits[rows, ends - 1]
    if process is not None:
        last = quick_jit(lambda process, *inputs: process(*inputs))(process, padded[rows], ends, last)
    assert last.argmax(-1).tolist() == padded[rows, ends].tolist()


def test_logits_of_drafts_are_processed_too_and_padding_is_ignored(tmp_path):
    """Three prompts in one padded batch with drafts; transformers ran each alone."""
    made = fixture_files.values("settings.json")
    config, texts = config_of_case(tmp_path, 10), made["cases"][10]["texts"]
    lengths = np.array([len(prompt) for prompt in made["prompts"]])
    prompts = np.array([prompt + [texts[0][0]] * (lengths.max() - len(prompt)) for prompt in made["prompts"]])
    _, process = sampling_and_processor(config, lengths)
    ends = np.array(config.eos_token)
    quick = quick_jit(speculate, static_argnames=("max_new_tokens",))
    result = quick(prompts, lengths, target(), process, ends, max_new_tokens=made["max_new_tokens"])
    rows = zip(result.tokens.tolist(), lengths, result.lengths, strict=True)
    assert [row[begin:end] for row, begin, end in rows] == texts


def test_filters_become_processors_where_a_truncation_follows(tmp_path):
    folder = write(tmp_path, do_sample=True, temperature=0.5, top_k=9, typical_p=0.9, epsilon_cutoff=0.01)
    config = load_generation_config(folder)
    sampling, process = sampling_and_processor(config, [1])
    assert sampling == ss.SamplingParams(0.5)
    steps = truncation.Filters(config.sampling), truncation.Typical(0.9, 0.5), truncation.EpsilonCutoff(0.01, 0.5)
    assert process == processors.Chain(steps)
    greedy = load_generation_config(write(tmp_path, temperature=0.5, typical_p=0.9))
    assert sampling_and_processor(greedy, [1]) == (GREEDY, None)
    assert greedy.stated_sampling == ss.SamplingParams(0.5)


def test_another_batch_of_prompts_needs_no_new_trace(tmp_path):
    config = load_generation_config(write(tmp_path, eos_token_id=2, min_new_tokens=3, repetition_penalty=1.2))
    others = config._replace(logits=config.logits._replace(repetition_penalty=1.4))
    structures = [jax.tree.structure(sampling_and_processor(each, [4, 1])[1]) for each in (config, others)]
    assert structures[0] == structures[1]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"repetition_penalty": 0}, "repetition_penalty in FILE must be a finite number above 0, got 0; ignore=('repe"),
        ({"repetition_penalty": "1.1"}, "must be a finite number above 0, got '1.1'; ignore="),
        ({"repetition_penalty": True}, "must be a finite number above 0, got True; ignore="),
        ({"presence_penalty": 3}, "presence_penalty in FILE must be a number from -2 to 2, got 3; ignore="),
        ({"frequency_penalty": -2.5}, "frequency_penalty in FILE must be a number from -2 to 2, got -2.5; ignore="),
        ({"no_repeat_ngram_size": -1}, "must be a whole number from 0 to 2147483647, got -1; ignore="),
        ({"bad_words_ids": [[]]}, "must be a list of lists of one token or more, each from 0 to 60, got [[]]; ignore="),
        ({"bad_words_ids": [[3, 61]]}, "each from 0 to 60, got [[3, 61]]; ignore="),
        ({"bad_words_ids": [3]}, "each from 0 to 60, got [3]; ignore="),
        ({"min_length": 2.5}, "min_length in FILE must be a whole number from 0 to 2147483647, got 2.5; ignore="),
        ({"min_new_tokens": "5"}, "min_new_tokens in FILE must be a whole number from 0 to 2147483647, got '5'"),
        ({"suppress_tokens": [61]}, "suppress_tokens in FILE must be a list of tokens from 0 to 60, got [61]; ignore="),
        ({"begin_suppress_tokens": 4}, "begin_suppress_tokens in FILE must be a list of tokens from 0 to 60, got 4"),
        ({"forced_bos_token_id": -1}, "forced_bos_token_id in FILE must be a token from 0 to 60, got -1; ignore="),
        ({"typical_p": 0}, "typical_p in FILE must be a number above 0 and at most 1, got 0; ignore="),
        ({"epsilon_cutoff": 1.0}, "epsilon_cutoff in FILE must be a number of at least 0 and below 1, got 1.0; ignore"),
        ({"num_beams": 4}, "ignore=('num_beams',), or --ignore num_beams of the command, leaves it out."),
        ({"penalty_alpha": 0.6}, "or --ignore penalty_alpha of the command, leaves it out."),
    ],
)  # fmt: skip
def test_a_wrong_value_is_reported_in_one_sentence(tmp_path, values, sentence):
    file = tmp_path / "generation_config.json"
    with pytest.raises(ValueError, match=re.escape(sentence.replace("FILE", str(file)))) as caught:
        load_generation_config(write(tmp_path, **values))
    assert str(caught.value).endswith("leaves it out.")
    (name,) = values
    assert load_generation_config(tmp_path, ignore=(name,)).logits == LogitsSettings()


TRANSFORMERS = """
import json, sys, torch, transformers
folder, request = sys.argv[1], json.loads(sys.argv[2])
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
texts = []
for settings in request["cases"]:
    for prompt in request["prompts"]:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                             max_new_tokens=request["max_new_tokens"], **settings)
        texts.append(out[0, len(prompt):].tolist())
print(json.dumps(texts))
"""


@pytest.mark.slow
@pytest.mark.skipif(not PEERS_PYTHON.exists(), reason="needs the environment that bench/peers/make_env.sh makes")
@pytest.mark.skipif(not REAL.exists(), reason="bench/real/fetch.sh smollm2 was not run")
def test_texts_of_a_real_checkpoint_equal_those_of_transformers():
    from specsamp_jax.text import load_tokenizer

    tokenizer = load_tokenizer(REAL)
    questions = ["Write a short poem about rain.", "List ten animals, one per line."]
    prompts = [tokenizer.encode_chat([{"role": "user", "content": question}]) for question in questions]
    cases = [{"repetition_penalty": 1.1}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 3}]
    request = json.dumps({"cases": cases, "prompts": prompts, "max_new_tokens": 64})
    command = [PEERS_PYTHON, "-c", TRANSFORMERS, REAL, request]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    config, target = load_generation_config(REAL), load_checkpoint(REAL, dtype="float32")
    lengths = np.array([len(prompt) for prompt in prompts])
    padded = np.array([prompt + [0] * (lengths.max() - len(prompt)) for prompt in prompts])
    texts = []
    for settings in cases:
        changed = config._replace(logits=LogitsSettings(**settings))
        _, process = sampling_and_processor(changed, lengths)
        result = speculate(padded, lengths, target, process, config.eos_token, 64)
        rows = zip(result.tokens.tolist(), lengths, result.lengths, strict=True)
        texts += [row[begin:end] for row, begin, end in rows]
    assert texts == json.loads(done.stdout)
