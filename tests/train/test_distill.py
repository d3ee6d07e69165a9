"""Distillation from a folder to a folder: drafters load at once, and an interruption changes no weight."""

import shutil
import wave

import jax
import numpy as np
import pytest
from fixture_files import FIXTURES
from flax import nnx
from text_target import SIZES, write_target
from whisper_fixture import SHORT

from specsamp_jax import train
from specsamp_jax.models import Gemma2, Gemma2Config, Llama, LlamaConfig, save_checkpoint
from specsamp_jax.models.whisper.checkpoint import encoder_difference
from specsamp_jax.speech import load_speech
from specsamp_jax.speech.sound_files import SUFFIXES
from specsamp_jax.train import data, drafters
from specsamp_jax.train.drafters import spread_layers

pytestmark = pytest.mark.optimised(False)

WHISPER = FIXTURES / "whisper/multilingual"
OPTIONS = train.Options(num_steps=24, batch_size=4, length=8, learning_rate=1e-2, held_out=0.3)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("target"))


@pytest.fixture
def sounds(tmp_path):
    """A folder of six sounds of less than a second."""
    folder = tmp_path / "sounds"
    folder.mkdir()
    for i in range(6):
        samples = np.roll(SHORT[0], 997 * i)[:9600]
        with wave.open(str(folder / f"{i}.wav"), "wb") as file:
            file.setparams((1, 2, 16_000, 0, "NONE", ""))
            file.writeframes((samples * 32767).astype("<i2").tobytes())
    return folder


def test_a_drafter_of_a_whisper_shares_all_but_its_layers(sounds, tmp_path):
    out = tmp_path / "drafter"
    options = train.Options(num_steps=30, batch_size=3, length=8, learning_rate=3e-3, held_out=0.4)
    report = train.distill_speech(WHISPER, [sounds], out, options=options, layers=[1])
    assert report.greedy_acceptance_rate > 0.2
    assert report.tokens_per_step == pytest.approx(
        (1 - report.acceptance_rate**6) / (1 - report.acceptance_rate), rel=1e-4
    )
    target, draft = load_speech(WHISPER), load_speech(out)
    assert encoder_difference(target.module, draft.module) is None
    assert draft.module.config.decoder_layers == 1
    ours, theirs = (dict(nnx.to_flat_state(nnx.state(speech.module.decoder))) for speech in (draft, target))
    changed = {
        path[0] for path in ours if path[0] != "blocks" and not np.array_equal(ours[path][...], theirs[path][...])
    }
    assert not changed
    assert not np.array_equal(
        draft.module.decoder.blocks[0].mlp.up.kernel, target.module.decoder.blocks[1].mlp.up.kernel
    )


def test_sounds_of_other_formats_are_data(sounds):
    soundfile = pytest.importorskip("soundfile")
    for file in sounds.glob("*.wav"):
        soundfile.write(file.with_suffix(".flac"), *soundfile.read(file, dtype="int16"))
    files = data.find_files([sounds], SUFFIXES)
    assert [file.suffix for file in files] == 6 * [".flac", ".wav"]
    windows = list(data.read_windows(files, load_speech(WHISPER).module.config, held_out=0.4))
    for flac, wav in zip(windows[::2], windows[1::2], strict=True):
        np.testing.assert_array_equal(flac.features, wav.features)
        assert flac.held_out == wav.held_out


def test_layers_keep_their_kind_of_attention():
    config = Gemma2Config(
        vocab_size=8, hidden_size=8, num_hidden_layers=4, head_dim=4, sliding_window=3, query_pre_attn_scalar=4, **SIZES
    )
    draft = train.layers_of(Gemma2(config, rngs=nnx.Rngs(0)), [1, 3])
    assert draft.config.windows == (None, None)
    assert train.layers_of(Gemma2(config, rngs=nnx.Rngs(0)), [0]).config.windows == (3,)


def test_sizes_of_drafters():
    config = LlamaConfig(1000, 64, 160, 8, 8, 4)
    assert spread_layers(8, 3) == (0, 4, 7)
    for ratio in (0.1, 0.4):
        small = drafters.config_of_ratio(Llama, config, ratio)
        share = drafters.num_parameters(Llama, small) / drafters.num_parameters(Llama, config)
        assert 0.6 < share / ratio < 1.6
    module = Llama(config, rngs=nnx.Rngs(0))
    assert drafters.num_parameters(Llama, config) == sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module)))


def test_passages_are_held_out_by_their_content():
    text = "one\n\ntwo\nthree\n\n\n" + "x" * 1500 + "\n" + "y" * 1500 + "\nend"
    assert "".join(data.passages(text)) == text
    assert [len(passage) for passage in data.passages(text)][:2] == [5, 11]
    share = np.mean([data.is_held_out(f"passage {i}".encode(), 0.2) for i in range(2000)])
    assert 0.16 < share < 0.24  # 4.5 standard deviations


def test_a_tokenizer_of_another_model_is_refused(target, tmp_path):
    save_checkpoint(tmp_path, Llama(LlamaConfig(8, 16, 16, 1, 2, 1), rngs=nnx.Rngs(0)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(target / name, tmp_path)
    with pytest.raises(ValueError, match=r"does not fit the target: it gave token \d+, and the target has 8"):
        train.distill_text(tmp_path, [target], tmp_path / "out", options=OPTIONS)
