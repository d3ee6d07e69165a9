"""What the tests of Whisper share: the fixtures, and the sounds that they were made of."""

import functools
import json
import sys
from pathlib import Path

import numpy as np

from specsamp_jax.models import load_module
from specsamp_jax.models.whisper.features import log_mel

FIXTURES = Path(__file__).parents[1] / "fixtures" / "whisper"
sys.path.append(str(FIXTURES.parent))

from whisper_inputs import texts_and_logits as texts_and_logits  # noqa: E402
from whisper_inputs import waveform as waveform  # noqa: E402

SHORT = [waveform(1, 1.3), waveform(2, 2.0), waveform(3, 0.7)]
LONG = [waveform(4, 5.0), waveform(5, 2.7)]


@functools.cache
def module(name):
    return load_module(FIXTURES / name, dtype="float32")


@functools.cache
def outputs(name):
    with np.load(FIXTURES / name / "outputs.npz") as file:
        return dict(file)


@functools.cache
def generated(name):
    return json.loads((FIXTURES / "generated.json").read_text())[name]


def windows(name, waveforms):
    """Features of one window each."""
    config = module(name).config
    padded = (np.pad(samples, (0, config.num_frames * 160 - samples.size)) for samples in waveforms)
    return np.stack([log_mel(samples, config.num_mel_bins) for samples in padded])


def assert_close(value, expected):
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
