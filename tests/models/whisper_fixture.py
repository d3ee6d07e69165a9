"""The Whisper fixtures, and the waveforms from which they were computed."""

import functools

import fixture_files
import numpy as np
from whisper_inputs import texts_and_logits as texts_and_logits
from whisper_inputs import waveform as waveform

from specsamp_jax.models import load_module
from specsamp_jax.models.whisper.features import log_mel

FIXTURES = fixture_files.FIXTURES / "whisper"
SHORT = [waveform(1, 1.3), waveform(2, 2.0), waveform(3, 0.7)]
LONG = [waveform(4, 5.0), waveform(5, 2.7)]


@functools.cache
def module(name):
    return load_module(FIXTURES / name, dtype="float32")


def outputs(name):
    return fixture_files.arrays(f"whisper/{name}/outputs.npz")


def generated(name):
    return fixture_files.values("whisper/generated.json")[name]


def windows(name, waveforms):
    """Features of each waveform, one window long."""
    config = module(name).config
    padded = (np.pad(samples, (0, config.num_frames * 160 - samples.size)) for samples in waveforms)
    return np.stack([log_mel(samples, config.num_mel_bins) for samples in padded])
