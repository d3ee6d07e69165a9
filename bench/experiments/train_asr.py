"""Distils a Whisper's drafter from synthetic speech, and measures what the target accepts on the test sets.

    train_asr.py train --target FOLDER --data FOLDER --out FOLDER [--minutes 2.5] [--versions 4]
                       [--sentences FILE --speak 14000] [--compare FOLDER]
    train_asr.py assemble --target FOLDER --layers FOLDER --out FOLDER

`train` reads train.zip and test.zip of asr_data.py. Each training utterance is heard through several random channels,
transcribed by the target, and the drafter's two decoder layers are trained on those transcripts. It writes the layers
(layer0.safetensors, layer1.safetensors, float16) and training.json. `assemble` makes a drafter's folder of the target's
and of the layers. On an H100 `train` takes less than six minutes.

With `--sentences`, a file with a sentence per line, espeak-ng speaks that many more utterances, whose transcripts are
their texts (see asr_spoken.py). `--compare` names the folder of another drafter, which is measured too.
"""

import argparse
import functools
import json
import multiprocessing
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import asr_audio
import asr_data
import asr_spoken
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

import specsamp_jax as ss
from specsamp_jax import train
from specsamp_jax.decoding.stats import accepted_by_position
from specsamp_jax.models.whisper.features import log_mel
from specsamp_jax.models.whisper.model import decoder_model, encode
from specsamp_jax.speech import Speech, load_speech
from specsamp_jax.train.data import is_held_out
from specsamp_jax.train.distill import distill_windows
from specsamp_jax.train.folder import save_speech_drafter
from specsamp_jax.train.speech import SpeechData, label

LAYERS = (0, 5)
LAYER = "model.decoder.layers.{}."
NUM_DRAFT = 5
WINDOW = 30 * asr_audio.RATE
HELD_OUT = 0.05
TRAINED_TOKENS, TESTED_TOKENS = 92, 120  # of a transcript
CHUNK = 1024  # windows labelled before their states are stored


def features(version: int | None, num_mel_bins: int, item: tuple[int, bytes]) -> np.ndarray:
    """Returns the features of an Ogg file in float16, heard through the channel of a version; None: as it is."""
    index, content = item
    waveform = asr_audio.decode(content)[:WINDOW]
    if version is not None:
        waveform = asr_audio.degrade(np.random.default_rng([index, version]), waveform)
    return log_mel(np.pad(waveform, (0, WINDOW - waveform.size)), num_mel_bins).astype(np.float16)


def labelled(
    target: Speech, found: list[np.ndarray], batch_size: int, max_tokens: int, say: Callable[[str], None]
) -> SpeechData:
    """Returns the target's transcripts of at most `max_tokens`, and its states, which are kept in float16."""
    parts = []
    for begin in range(0, len(found), CHUNK):
        part = label(
            target,
            [each.astype(np.float32) for each in found[begin : begin + CHUNK]],
            language="en",
            max_new_tokens=max_tokens,
            batch_size=min(batch_size, len(found)),
            progress_fn=lambda progress: None,
        )
        parts.append(part._replace(states=part.states.astype(jnp.float16)))
        say(f"transcribed {min(begin + CHUNK, len(found))} of {len(found)} windows")
    states, tokens = jnp.concatenate([part.states for part in parts]), np.concatenate([part.tokens for part in parts])
    return SpeechData(states, tokens[:, : np.flatnonzero((tokens >= 0).any(0))[-1] + 1], parts[0].num_prompt)


def measure(target: Speech, draft: Any, states: jax.Array) -> dict[str, Any]:
    """Transcribes windows greedily with drafts, and returns the acceptance by position."""
    settings, num = target.settings, len(states)
    prompt = np.tile(np.array(settings.prompt(language="en", task=None, timestamps=False), np.int32), (num, 1))
    text = ss.generate(
        jax.random.key(0),
        prompt,
        target=decoder_model(target.module, states),
        draft=decoder_model(draft, states),
        num_draft=NUM_DRAFT,
        max_new_tokens=TESTED_TOKENS,
        sampling=ss.SamplingParams(temperature=0.0),
        eos_token=settings.end_tokens,
        process_logits_fn=settings.rules(prompt.shape[1], timestamps=False),
    )
    drafted, accepted = (np.asarray(count) for count in (text.stats.num_drafted, text.stats.num_accepted))
    tried = drafted[0] + accepted[:-1].sum()
    return {
        "utterances": num,
        "acceptance": float(accepted.sum() / tried),
        "acceptance_by_position": [round(float(rate), 4) for rate in accepted_by_position(drafted, accepted)],
        "accepted_share_of_drafted": float(accepted.sum() / drafted.sum()),
        "tokens_per_step": float(1 + accepted.sum() / drafted[0]),
        "emitted": int(np.sum(text.stats.num_emitted)),
        "steps": int(drafted[0]),
    }


def run(args: argparse.Namespace) -> None:
    """Trains, measures, and writes the layers and training.json."""
    began = time.perf_counter()

    def say(message: str) -> None:
        print(f"{time.perf_counter() - began:6.1f} s  {message}", flush=True)

    packs = {name: list(asr_audio.read_pack(args.data / f"{name}.zip"))[: args.limit] for name in ("train", "test")}
    # Workers inherit it: with a thread per core in each, NumPy's products took eight times as long.
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:

        def read(name: str, version: int | None) -> list[np.ndarray]:
            items = [(i, content) for i, (_, content) in enumerate(packs[name])]
            return list(pool.map(functools.partial(features, version, 80), items, chunksize=8))

        versions = [read("train", version) for version in range(args.versions)]
        test = read("test", None)
        say(f"{len(packs['train'])} training utterances in {args.versions} versions, {len(test)} of the test")
        aside = [is_held_out(utterance.text.encode(), HELD_OUT) for utterance, _ in packs["train"]]
        aside[0], aside[-1] = True, False  # so that a trial with few utterances has both
        texts, heard = [], []
        if args.sentences:
            out = [utterance for (utterance, _), side in zip(packs["train"], aside, strict=True) if side]
            refused = set().union(*(asr_data.shingles(u.text) for u in [*out, *(u for u, _ in packs["test"])]))
            texts = asr_spoken.read_sentences(args.sentences, args.speak, refused)
            # The workers speak while the target transcribes.
            heard = pool.map(asr_spoken.hear, enumerate(texts), chunksize=8)
        target = load_speech(args.target)
        kept, held_out = (
            labelled(
                target,
                [each for version in versions for each, out in zip(version, aside, strict=True) if out == side],
                args.batch_size,
                args.tokens,
                say,
            )
            for side in (False, True)
        )
        if texts:
            sizes = {"max_tokens": args.tokens, "batch_size": min(args.batch_size, len(texts))}
            kept = asr_spoken.add(target, kept, texts, heard, **sizes, say=say)
            say(f"{len(kept.tokens)} windows")
    options = train.Options(
        num_steps=args.steps,
        minutes=None if args.steps else args.minutes,
        batch_size=args.train_batch,
        learning_rate=args.learning_rate,
        num_draft=NUM_DRAFT,
        save_seconds=1e9,
    )
    with tempfile.TemporaryDirectory() as folder:
        draft, params, num_steps, sums = distill_windows(
            target.module,
            kept,
            held_out,
            options=options,
            layers=LAYERS,
            folder=Path(folder),
            settings={},
            progress_fn=lambda progress: (
                say(f"{progress.task} {progress.num_done} of {progress.num_total}, loss {progress.loss}")
                if progress.num_done % 500 == 0 or progress.num_done == progress.num_total
                else None
            ),
        )
        save_speech_drafter(args.target, len(LAYERS), params, Path(folder) / "drafter")
        tensors = load_file(Path(folder) / "drafter/model.safetensors")
    args.out.mkdir(parents=True, exist_ok=True)
    for i in range(len(LAYERS)):
        layer = {name: value for name, value in tensors.items() if name.startswith(LAYER.format(i))}
        save_file(layer, args.out / f"layer{i}.safetensors")
    num_windows, rates = len(kept.tokens), sums[:2] / sums[2]
    del kept, held_out  # tens of gigabytes of states
    report = {
        "layers": LAYERS,
        "steps": num_steps,
        "windows": num_windows,
        "held_out_synthetic_speech": {
            "positions": int(sums[2]),
            "acceptance_at_temperature_1": float(rates[0]),
            "same_most_probable_token": float(rates[1]),
        },
        "test": {},
        "device": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "options": {name: str(value) for name, value in vars(args).items()},
    }

    def write() -> None:
        report["seconds"] = round(time.perf_counter() - began, 1)
        (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")

    write()
    # The clips of the audio book join the prompts, so that all sets have one size and share a program.
    groups = ["human" if each.group in ("asterisk", "librivox") else each.group for each, _ in packs["test"]]
    untrained = train.layers_of(target.module, LAYERS)
    assert nnx.state(untrained.decoder.blocks)
    others = {"another drafter": load_speech(args.compare).module} if args.compare else {}
    for group in dict.fromkeys(groups):
        rows = [each.astype(np.float32) for each, name in zip(test, groups, strict=True) if name == group]
        states = encode(target.module, np.stack(rows))
        report["test"][group] = measure(target, draft, states)
        for name, other in {**others, **({"before training": untrained} if group == "human" else {})}.items():
            report["test"][f"{group}, {name}"] = measure(target, other, states)
        say(f"{group}: {report['test'][group]}")
        write()
    print(json.dumps(report, indent=1))


def assemble(args: argparse.Namespace) -> None:
    """Writes the folder of the drafter: the target's tensors but those of its decoder's layers, and the new layers."""
    args.out.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: value
        for name, value in load_file(args.target / "model.safetensors").items()
        if not name.startswith(LAYER.format("")[:-1])
    }
    for i in range(len(LAYERS)):
        tensors |= load_file(args.layers / f"layer{i}.safetensors")
    save_file(tensors, args.out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((args.target / "config.json").read_text())
    (args.out / "config.json").write_text(json.dumps({**config, "decoder_layers": len(LAYERS)}, indent=1) + "\n")
    for name in ("generation_config.json", "tokenizer.json"):
        shutil.copyfile(args.target / name, args.out / name)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    training, assembling = commands.add_parser("train"), commands.add_parser("assemble")
    for command in (training, assembling):
        command.add_argument("--target", type=Path, required=True)
        command.add_argument("--out", type=Path, required=True)
    assembling.add_argument("--layers", type=Path, required=True)
    training.add_argument("--data", type=Path, required=True)
    training.add_argument("--minutes", type=float, default=2.5)
    training.add_argument("--steps", type=int, help="instead of minutes")
    training.add_argument("--versions", type=int, default=4, help="channels through which each utterance is heard")
    training.add_argument("--tokens", type=int, default=TRAINED_TOKENS, help="of a transcript, the most")
    training.add_argument("--sentences", type=Path, help="a file with a sentence per line, for further speech")
    training.add_argument("--speak", type=int, default=14_000, help="utterances from those sentences")
    training.add_argument("--compare", type=Path, help="the folder of another drafter, to be measured too")
    training.add_argument("--learning-rate", type=float, default=5e-4)
    training.add_argument("--train-batch", type=int, default=48)
    training.add_argument("--batch-size", type=int, default=256, help="windows transcribed at once")
    training.add_argument("--workers", type=int, default=16)
    training.add_argument("--limit", type=int, help="utterances of each pack, for a trial")
    args = parser.parse_args()
    {"train": run, "assemble": assemble}[args.command](args)


if __name__ == "__main__":
    main()
