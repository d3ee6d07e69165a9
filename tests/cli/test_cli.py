"""`specsamp generate` and `specsamp demo`: output, settings, and the sentence that reports a wrong option."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import specsamp_jax as ss
from specsamp_jax.cli import demo_checks, draft_length, generation, memory
from specsamp_jax.cli.pair import ASSETS
from specsamp_jax.cli.rows import Row, in_order
from specsamp_jax.decoding.ahead import compile_stream
from specsamp_jax.models import Llama, LlamaConfig, load_checkpoint, load_module, save_checkpoint, with_vocab_size
from specsamp_jax.text import load_tokenizer

pytestmark = pytest.mark.optimised(False)

TOKENIZER = Path(__file__).parents[1] / "fixtures" / "text" / "byte_level"
CHATML = TOKENIZER.parent / "templates" / "chatml.jinja"
WHISPER = TOKENIZER.parents[1] / "whisper" / "multilingual"
NUM_TOKENS = 291  # of the tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A target of 300 logits and a drafter of 291, with one tokenizer."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, size, seed in (("target", 300, 0), ("draft", NUM_TOKENS, 1)):
        config = LlamaConfig(size, 16, 24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
        shutil.copytree(TOKENIZER, root / name)
        module = Llama(config, rngs=nnx.Rngs(seed))
        module.vocabulary.head.set_value(
            module.vocabulary.head[...] * 40
        )  # the two largest logits differ by more than rounding
        save_checkpoint(root / name, module, dtype="float32")
    shutil.copy(CHATML, root / "target" / "chat_template.jinja")
    return root


def alone(folders, prompts, max_new_tokens):
    """Each prompt with its greedy continuation by the target alone, as tokens."""
    lengths = [len(prompt) for prompt in prompts]
    result = ss.generate(
        jax.random.key(0),
        np.array([[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in prompts]),
        prompt_lengths=np.array(lengths),
        target=load_checkpoint(folders / "target"),
        draft=None,
        max_new_tokens=max_new_tokens,
        sampling=ss.SamplingParams(temperature=0.0),
        eos_token=281,
    )
    return [row[:length].tolist() for row, length in zip(np.asarray(result.tokens), result.lengths, strict=True)]


# Continuing texts


def test_a_prompt_is_continued_by_the_pair_in_the_package_and_the_seed_decides(run, one_layer_pair):
    prompt = "Return the"
    options = ("--prompt", prompt, "--max-new-tokens", "12", "--top-k", "40", "--num-draft", "2")
    status, text, progress = run("generate", *options)
    assert status == 0
    assert text.startswith(prompt)
    assert len(text) > len(prompt) + 10
    assert "temperature 1.0, top-k 40, top-p 1.0, min-p 0.0; ends at token 0" in progress
    assert re.search(r"12 tokens in \d+ steps of the target, [\d.]+ per step; \d+ tokens per second, after", progress)
    assert re.search(r"\d+ tokens drafted, \d+ accepted; by position, .*: [\d.]+ [\d.]+\n", progress)
    assert run("generate", *options)[1] == text
    assert run("generate", *options, "--seed", "1")[1] != text


def test_prompts_are_continued_in_order_by_the_models_of_two_folders(run, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(draft_length, "LENGTHS", (0, 2))
    texts = ["the", "three threads 🙂 of the tree"]
    (tmp_path / "prompt.txt").write_text(texts[1], encoding="utf-8")
    options = ["--target", folders / "target", "--draft", folders / "draft", "--temperature", 0, "--max-new-tokens", 9]
    prompts = ["--prompt", texts[0], "--prompt-file", tmp_path / "prompt.txt"]
    status, printed, progress = run("generate", *options, *prompts)
    assert status == 0
    assert "the target has 300 logits and the draft 291: the draft's are made to fit" in progress
    assert "greedy; ends at token 281" in progress
    tokenizer = load_tokenizer(TOKENIZER)
    wholes = map(tokenizer.decode, alone(folders, list(map(tokenizer.encode, texts)), 9))
    assert printed == "\n\n".join(wholes) + "\n"


def test_a_chat_message_is_put_into_the_chat_template(run, folders):
    options = ["--target", folders / "target", "--draft", "ngram", "--system", "Brief.", "--chat", "the?"]
    options += ["--max-new-tokens", 6, "--temperature", 0, "--num-draft", 2, "--verify", "sigmoid"]
    status, reply, progress = run("generate", *options)
    assert status == 0
    assert "approximate" in progress
    tokenizer = load_tokenizer(folders / "target")
    said = "<|im_start|>system\nBrief.<|im_end|>\n<|im_start|>user\nthe?<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokenizer.tokenizer.encode(said, add_special_tokens=False).ids
    assert reply == tokenizer.decode(alone(folders, [prompt], 6)[0][len(prompt) :]) + "\n"


def test_an_interrupt_ends_the_line_and_reports_the_counts(run, replace_stream, folders):
    def interrupted(key, prompt, *, prompt_lengths, **options):
        tokens = np.concatenate([prompt[:, : prompt_lengths[0]], [[ord("x") - 33]]], axis=1)
        stats = ss.Stats(*map(jax.numpy.asarray, (1, [1], np.zeros(0, "i"), np.zeros(0, "i"), [0])))
        yield ss.Generation(*map(jax.numpy.asarray, (tokens, [tokens.shape[1]], 0.0 * tokens)), stats)
        raise KeyboardInterrupt

    replace_stream(interrupted)
    status, text, progress = run("generate", "--target", folders / "target", "--prompt", "the")
    assert (status, text) == (130, "thex\n")
    assert "1 tokens in 1 steps of the target" in progress
    assert "longer" not in progress
    options = ["--prompt", "the", "--max-new-tokens", 2047]
    progress = run("generate", "--target", folders / "target", *options)[2]
    assert "the target was trained on texts of up to 2048 tokens, and this one may become longer" in progress
    assert "there is no drafter: the target decodes alone" in progress


# Wrong options


def assert_complains(result, sentence):
    status, text, told = result
    assert status == 2
    assert text == ""
    complaint = re.sub(r"^loading .*\n", "", told, flags=re.MULTILINE)
    assert sentence in complaint
    assert complaint.startswith("specsamp: ")
    assert complaint.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("generate",), "Missing option '--prompt', '--prompt-file', '--prompts' or '--chat'."),
        (("generate", "--prompt", "a", "--num-draft", "-1"), "'--num-draft': -1 is not in the range 0<=x<=32."),
        (("generate", "--prompt", "a", "--top-p", "1.5"), "'--top-p': 1.5 is not in the range 0<=x<=1."),
        (("generate", "--prompt", "a", "--temperature", "hot"), "'hot' is not a valid float range."),
        (("generate", "--prompt", "a", "--verify", "best"), "'block', 'coupled', 'sigmoid', 'calibrated'."),
        (("generate", "--prompt", "a", "--alpha", "0"), "'--alpha' is for '--verify sigmoid'; got '--verify token'."),
        (
            ("generate", "--prompt", "a", "--verify", "sigmoid", "--alpha", "2e4"),
            "'--beta' must be above '--alpha'; got 10000 and 20000.",
        ),
        (
            ("generate", "--prompt", "a", "--verify", "block", "--num-draft", "0"),
            "'--verify block' decides drafts, and there is no drafter.",
        ),
        (("generate", "--prompt", "a", "--dtype", "int8"), "'int8' is not one of 'float32', 'bfloat16', 'float16'."),
        (("generate", "--prompt", "a", "--sead", "1"), "No such option"),
        (("generate", "--prompt-file", "nowhere"), "--prompt-file 'nowhere': No such file or directory."),
        (("generate", "--prompt", "a", "--chat", "b"), "give one of the two"),
        (("generate", "--prompt", "a", "--system", "b"), "'--system' comes before '--chat', which is missing."),
        (("generate", "--prompt", "a", "--draft", "d"), "go with '--target', which is missing."),
        (("generate", "--prompt", "a", "--target", "nowhere"), "--target must be a folder, but there is no nowhere."),
        (("generate", "--prompt", "a", "--target", ASSETS / "target", "--draft", "ngrams"), "; did you mean 'ngram'?"),
        (
            ("generate", "--prompt", "a", "--target", WHISPER),
            "--target must hold a model of text, got a Whisper; `specsamp transcribe` is for speech.",
        ),
        (("generate", "--prompt", "a", "--target", CHATML), "--target must be a folder or a GGUF file, got the file"),
        (
            ("generate", "--chat", "b"),
            "has no chat template, as is usual for base models: it can continue a text",
        ),
        (("dance",), "No such command 'dance'."),
        (("generate", "--prompt", "a", "--temperature", "nan"), "'--temperature': nan is not a finite number."),
        (("generate", "--prompt", "a", "--temperature", "inf"), "'--temperature': inf is not a finite number."),
        (("generate", "--prompt", "a", "--top-p", "nan"), "'--top-p': nan is not a finite number."),
        (("generate", "--prompt", "a", "--min-p", "nan"), "'--min-p': nan is not a finite number."),
        (("generate", "--prompt", "a", "--repetition-penalty", "0"), "'--repetition-penalty': 0.0 is not in the range"),
        (("generate", "--prompt", "a", "--typical-p", "0"), "'--typical-p': 0.0 is not in the range 0<x<=1."),
        (("generate", "--prompt", "a", "--top-k", "4294967296"), "4294967296 is not in the range 0<=x<=2147483647."),
        (("generate", "--prompt", "a\udcff"), "'--prompt': byte 0xff in 'a\\udcff' is not text in UTF-8."),
        (("generate", "--chat", "\udce9"), "'--chat': byte 0xe9 in"),
        (("generate", "--prompt-file", "."), "--prompt-file '.': Is a directory."),
        (("generate", "--prompt-file", "/dev/zero"), "'/dev/zero' must have at most 67,108,864 bytes, and has more."),
        (("generate", "--prompt-file", ASSETS / "target" / "model.safetensors"), "must be text in UTF-8, but byte"),
        (
            ("generate", "--prompt", "a", "--max-new-tokens", 10**9),
            "GB are free. The target was trained on texts of up",
        ),
        (
            ("generate", "--prompt", "a", "--max-new-tokens", 10**40),
            "GB are free. The target was trained on texts of up",
        ),
    ],
)
def test_a_wrong_option_is_reported_in_one_sentence(run, arguments, sentence):
    assert_complains(run(*arguments), sentence)


def test_folders_that_do_not_fit_together_are_reported_in_one_sentence(run, folders, tmp_path):
    def complains(sentence, *options, target=folders / "target", prompt="the"):
        result = run("generate", "--target", target, "--prompt", prompt, *options)
        assert_complains(result, sentence)

    def without(name, target):
        folder = Path(shutil.copytree(target, tmp_path / f"without {name}"))
        (folder / name).unlink()
        return folder

    complains("--draft must be a folder or 'ngram', but there is no nowhere.", "--draft", "nowhere")
    complains("--tokenizer must be a folder, but there is no nowhere.", "--tokenizer", "nowhere")
    complains("must hold config.json", target=TOKENIZER)
    complains("target and draft must share a vocabulary", "--draft", TOKENIZER.parent / "byte_fallback")
    bare = without("tokenizer.json", folders / "target")
    complains("must hold tokenizer.json, which is missing", target=bare)
    no_begin = Path(shutil.copytree(TOKENIZER, tmp_path / "no begin"))
    values = json.loads((no_begin / "tokenizer.json").read_text())
    (no_begin / "tokenizer.json").write_text(json.dumps({**values, "post_processor": None}))
    broken = Path(shutil.copytree(folders / "target", tmp_path / "broken"))
    (broken / "config.json").write_text("{")
    complains("config.json must be a JSON object, but it cannot be parsed", target=broken)
    complains("has no token", "--tokenizer", no_begin, target=bare, prompt="")
    small = Path(shutil.copytree(TOKENIZER, tmp_path / "small"))
    config = LlamaConfig(260, 8, 8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    save_checkpoint(small, Llama(config, rngs=nnx.Rngs(0)))
    complains("The tokenizer does not fit the target: it gave token 280 of 260.", target=small)


def test_end_tokens_are_read_from_the_checkpoint(folders, tmp_path):
    folder = Path(shutil.copytree(folders / "target", tmp_path / "copy"))

    def ends():
        return generation.load(folder, None, None).config.eos_token

    def write(name, **values):
        path = folder / name
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**old, **values}))

    assert ends() == (281,)  # the tokenizer's <eos>
    write("config.json", eos_token_id=7)
    assert ends() == (7,)
    write("generation_config.json", eos_token_id=[8, 9])
    assert ends() == (8, 9)


@pytest.fixture
def settings_of(run, replace_stream, folders, tmp_path):
    """Runs `generate` on a folder with these settings; returns the arguments of `stream` and the messages."""
    folder = Path(shutil.copytree(folders / "target", tmp_path / "copy"))

    def settings_of(values, *options, **replaced):
        (folder / "generation_config.json").write_text(json.dumps(values))
        calls = []
        replace_stream(lambda *_, **options: calls.append(options) or iter(()), **replaced)
        status, _, told = run("generate", "--target", folder, "--prompt", "the", "--max-new-tokens", 1, *options)
        assert status == 0, told
        return calls[0], told

    return settings_of


def test_options_take_the_place_of_the_checkpoint_s_settings(settings_of):
    values = {"do_sample": True, "temperature": 0.5, "top_k": 20, "repetition_penalty": 1.1, "num_beams": 2}
    options = ["--ignore", "num_beams", "--top-k", 3, "--no-repeat-ngram-size", 4, "--presence-penalty", 0.5]
    # The program is compiled with these processors.
    called, told = settings_of(values, *options, compile_fn=compile_stream)
    assert called["sampling"] == ss.SamplingParams(0.5, 3)
    penalty, counts, ngrams = called["process_logits_fn"].processors
    assert (penalty.penalty, counts.presence, counts.frequency, ngrams.size) == (1.1, 0.5, 0, 4)
    assert counts.prompt_lengths.tolist() == [2]
    settings = "repetition-penalty 1.1, presence-penalty 0.5, no-repeat-ngram-size 4; ends at token 281"
    assert f"temperature 0.5, top-k 3, top-p 1.0, min-p 0.0, {settings}" in told
    called, _ = settings_of(values, "--ignore", "num_beams", "--repetition-penalty", 1)
    assert called["process_logits_fn"] is None


@pytest.mark.parametrize(
    ("values", "options", "sampling", "message"),
    [
        ({}, ["--top-k", 3], (1.0, 3), "the checkpoint is greedy, and samples because of --top-k"),
        ({"top_p": 0.9, "temperature": 0.6}, ["--min-p", 0.1], (0.6, 0, 0.9, 0.1), "samples because of --min-p"),
        ({"top_p": 0.9}, ["--temperature", 0.7], (0.7, 0, 0.9), "temperature 0.7, top-k 0, top-p 0.9, min-p 0.0;"),
        ({}, ["--top-p", 0.5, "--temperature", 0], (0, 0, 0.5), "no effect of --top-p: --temperature 0 is greedy"),
        ({"do_sample": True, "top_k": 5}, ["--temperature", 0, "--top-k", 2], (0, 2), "no effect of --top-k:"),
        ({}, ["--repetition-penalty", 1.2], (0,), "greedy, repetition-penalty 1.2; ends"),
        (
            {},
            ["--typical-p", 0.9],
            (1.0,),
            "samples because of --typical-p\ntemperature 1.0, top-k 0, top-p 1.0, min-p",
        ),
    ],
)
def test_a_sampling_option_turns_greedy_decoding_off(settings_of, values, options, sampling, message):
    called, told = settings_of(values, *options)
    assert called["sampling"] == ss.SamplingParams(*sampling)
    assert message in told
    assert ("samples because" in told) == ("samples because" in message)


def test_a_drafter_without_a_tokenizer_is_assumed_to_share_the_target_s(folders, tmp_path):
    folder = Path(shutil.copytree(folders / "draft", tmp_path / "copy"))
    (folder / "tokenizer.json").unlink()
    setup = generation.load(folders / "target", str(folder), None)
    assert f"{folder} has no tokenizer.json: its tokens are assumed to be the target's" in setup.notes


# Memory, damaged weights, order of texts


def test_a_prompt_too_long_for_the_memory_is_reported(run, tmp_path):
    (tmp_path / "long.txt").write_text("the tree " * 110_000)
    result = run("generate", "--prompt-file", tmp_path / "long.txt")
    assert_complains(result, "for the attention scores of the prompts, and ")


def test_memory_is_counted_for_caches_and_scores(monkeypatch):
    def init_cache_fn(batch_size, max_length):
        return jax.numpy.zeros((batch_size, max_length, 5), "bfloat16"), jax.numpy.zeros(
            (batch_size, max_length), "int8"
        )

    model = ss.Model((), lambda *arguments: arguments, init_cache_fn)
    length = 6 + 62 + 32
    needed = 2 * 3 * length * 11 + 4 * 3 * 7 * 6 * length
    for free in (needed, None):
        monkeypatch.setattr(memory, "free_bytes", lambda free=free: free)
        memory.check((model, model), 3, 6, 62, num_heads=(7, 2), max_length=None)
    monkeypatch.setattr(memory, "free_bytes", lambda: needed - 1)
    with pytest.raises(ValueError, match="3 x 62 new tokens after prompts of up to 6 would take"):
        memory.check((model, model), 3, 6, 62, num_heads=(7, 2), max_length=None)
    monkeypatch.undo()
    assert 10**8 < memory.free_bytes() < 10**14


def test_damaged_weights_of_the_target_are_reported(run, folders, tmp_path):
    folder = Path(shutil.copytree(folders / "target", tmp_path / "nan"))
    module = load_module(folder)
    module.norm.weight.set_value(module.norm.weight[...] * np.nan)
    save_checkpoint(folder, module, dtype="float32")
    options = ("--draft", folder, "--temperature", 1, "--prompt", "the", "--max-new-tokens", 4, "--num-draft", 1)
    status, text, messages = run("generate", "--target", folder, *options)
    assert (status, text) == (1, "\n")
    assert messages.splitlines()[-1].startswith("specsamp: the target's logits for text 1 hold NaN or +inf")
    # As a drafter, a damaged model costs only speed.
    status, text, messages = run("generate", "--target", folders / "target", *options)
    assert status == 0
    assert text.startswith("the")
    assert (
        "the drafter's logits hold NaN or +inf, or are all -inf, at some steps: those drafts were rejected" in messages
    )


def test_texts_are_written_in_order_and_as_they_grow():
    tokenizer, rng = load_tokenizer(TOKENIZER).tokenizer, np.random.default_rng(0)
    rows = [rng.integers(0, 280, size=size).tolist() for size in (3, 8, 5)]  # without prompts
    growth = np.array([[2, 1, 0, 0, 0], [1, 2, 2, 2, 1], [1, 4, 0, 0, 0]])
    tokens = jax.numpy.array([row + [-1] * (8 - len(row)) for row in rows])
    stats = ss.Stats(*map(jax.numpy.asarray, (1, [1] * 3, np.zeros(0, "i"), np.zeros(0, "i"), [0] * 3)))
    ends = map(jax.numpy.asarray, growth.cumsum(axis=1).T)
    generations = [ss.Generation(tokens, end, 0.0 * tokens, stats) for end in ends]
    pieces = list(in_order(generations, [Row(tokenizer, max_tokens=9) for _ in rows], [0, 0, 0]))
    for row, ids in enumerate(rows):
        assert "".join(piece for i, piece in pieces if i == row) == tokenizer.decode(ids)
    # The first row is written as it grows; the second from the first step in which the first row gains nothing.
    assert [row for row, _ in pieces] == [0, 0, 0, 1, 1, 1, 1, 2]


def test_a_drafter_s_vocabulary_is_changed_only_if_it_differs(folders):
    draft = load_checkpoint(folders / "draft")
    assert with_vocab_size(draft, NUM_TOKENS) is draft
    with pytest.raises(ValueError, match="size must be at least 1; got 0"):
        with_vocab_size(draft, 0)


# The demo


def test_the_demo_shows_a_text_a_race_and_a_check(run, monkeypatch, one_layer_pair):
    monkeypatch.setattr(demo_checks, "NUM_CHECKED", 1024)
    monkeypatch.setattr(demo_checks, "NUM_PROMPTS", 2)
    monkeypatch.setattr(draft_length, "LENGTHS", (0, 1))
    status, text, _ = run("demo")
    assert status == 0
    assert "a docstring from a file that was not trained on" in text
    alone, speculative = (re.search(rf"{name} +(\d+) +([\d.]+)", text) for name in ("target alone", "with speculation"))
    assert alone
    assert speculative
    assert float(alone[2]) == 1.0
    assert 1.0 <= float(speculative[2]) <= 5
    # With one layer the drafter costs as much as the target.
    assert float(speculative[1]) > 0.2 * float(alone[1])
    assert re.search(r"a step without drafts takes [\d.]+ ms; steps of 1 drafts [\d.]+ times as long", text)
    assert re.search(r"\d+% of its steps drafted", text)
    assert re.search(r"Speculation was [\d.]+ times as fast as the target alone", text)
    check = re.search(r"chi-square [\d.]+ on \d+ degrees of freedom, p = ([\d.]+): (.*)", text)
    assert check
    assert float(check[1]) > 1e-3
    assert check[2] == "no evidence of a difference"
