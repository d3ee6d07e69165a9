"""Word times of this library beside those of transformers, on the same sounds.

    python bench/real/word_times.py ours WHISPER ours.json SOUND...      # writes ours.npz too: the sounds at 16 kHz
    python bench/real/their_words.py WHISPER theirs.json ours.npz        # in an environment with torch and transformers
    python bench/real/word_times.py compare ours.json theirs.json

Both decode greedily in float32. Words, starts and ends are compared; a sound with another text is printed and left out.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

LANGUAGE = "en"
CLOSE = 1e-6  # seconds, between times that are multiples of .02


def ours(folder: str, output: Path, *paths: str) -> None:
    """Writes the words of each sound with their times, and the sounds."""
    import jax

    from specsamp_jax.speech import load_audio, load_speech, transcribe

    sounds = {Path(path).stem: load_audio(path) for path in paths}
    if len(sounds) < len(paths):
        raise ValueError("each sound needs a file name of its own")
    target = load_speech(folder, dtype="float32")
    options = {"target": target, "draft": None, "language": LANGUAGE, "timestamps": "word"}
    transcripts = transcribe(jax.random.key(0), list(sounds.values()), **options).transcripts
    words = [[list(word) for part in each.segments for word in part.words or ()] for each in transcripts]
    output.write_text(json.dumps(dict(zip(sounds, words, strict=True))))
    arrays: dict[str, Any] = sounds
    np.savez(output.with_suffix(".npz"), **arrays)


def compare(ours: Path, theirs: Path) -> None:
    """Prints the words with other times, and how many are equal."""
    ours_by_sound, theirs_by_sound = (json.loads(path.read_text()) for path in (ours, theirs))
    total = equal = 0
    for name, expected in theirs_by_sound.items():
        found = ours_by_sound[name]
        if [word for *_, word in found] != [word for *_, word in expected]:
            print(f"{name}: another text")
            continue
        for mine, other in zip(found, expected, strict=True):
            total += 1
            if np.allclose(mine[:2], other[:2], rtol=0, atol=CLOSE):
                equal += 1
            else:
                print(f"{name}: {mine} for {other}")
    print(f"{equal} of {total} words have equal starts and ends")


if __name__ == "__main__":
    commands = {"ours": ours, "compare": compare}
    if len(sys.argv) < 4 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    command, first, second, *rest = sys.argv[1:]
    commands[command](Path(first) if command == "compare" else first, Path(second), *rest)
