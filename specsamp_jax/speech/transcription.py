"""Transcription of many utterances at once, by speculative decoding."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from specsamp_jax._types import Model, SamplingParams, Stats
from specsamp_jax.decoding.drafters import Drafter
from specsamp_jax.decoding.generate import generate
from specsamp_jax.decoding.num_draft import NumDraft, compiled_lengths
from specsamp_jax.decoding.stateful_rule import VerifyFn
from specsamp_jax.models.whisper.checkpoint import share_encoder
from specsamp_jax.models.whisper.features import HOP, SAMPLE_RATE, checked
from specsamp_jax.models.whisper.model import decoder_model, encode
from specsamp_jax.rules.verify import verify
from specsamp_jax.sampling import streams
from specsamp_jax.speech.checkpoint import Speech
from specsamp_jax.speech.windows import FixedWindows, Piece, SlidingWindows


class Segment(NamedTuple):
    """The text of a span of time.

    Attributes:
      start: Seconds from the beginning of the sound.
      end: Seconds from the beginning of the sound.
      text: The text.
    """

    start: float
    end: float
    text: str


class Transcript(NamedTuple):
    """The text of an utterance.

    Attributes:
      text: The whole text.
      segments: Its parts: between timestamps with timestamps, else one per window.
      tokens: The generated tokens, including timestamps and without prompts and end tokens.
      language: The code of the language, passed or detected; None for an English-only model.
    """

    text: str
    segments: tuple[Segment, ...]
    tokens: Int[np.ndarray, "n"]
    language: str | None


class Transcription(NamedTuple):
    """The texts of all utterances, and the counts of the decoding loops.

    Attributes:
      transcripts: One per utterance.
      stats: Sums over all batches of windows: steps, tokens emitted by each of N utterances, drafts verified and
        accepted at each of K draft positions, and the flags of each utterance's degenerate rows.
      verify_states: The state of the verification rule after each batch, its windows as rows; () where it has none.
    """

    transcripts: tuple[Transcript, ...]
    stats: Stats
    verify_states: tuple[Any, ...] = ()


Timestamps = Literal["auto", "always", "never"]
"""Which sounds are decoded with timestamps: with "auto" those longer than one window."""

ProgressFn = Callable[[float, float], None]
"""Called as `(seconds done, seconds in total)` after each batch of windows."""


def transcribe(
    key: Key[Array, "*keys"],
    waveforms: Sequence[Float[np.ndarray, "_"]],
    *,
    target: Speech,
    draft: Speech | Drafter | None,
    num_draft: NumDraft = 5,
    language: str | None = None,
    task: str | None = None,
    timestamps: Timestamps = "auto",
    sampling: SamplingParams = SamplingParams(temperature=0.0),
    max_new_tokens: int | None = None,
    batch_size: int = 8,
    verify_fn: VerifyFn = verify,
    progress_fn: ProgressFn | None = None,
) -> Transcription:
    """Returns the text of each utterance, with the distribution of the target's own sampling.

    Up to `batch_size` windows, of one or several utterances, are decoded together; windows have 30 s in all published
    models. Without timestamps the windows of an utterance are adjacent, and words at their edges are lost. With
    timestamps each begins at the end of the last segment of the one before, so a batch holds one window per utterance.
    Windows are decoded independently, and none is decoded again at a higher temperature.

    If the drafter's encoder equals the target's, it runs once for both; see `share_encoder`.

    Args:
      key: A key, or one per utterance. The draws of a window depend on its utterance's key and its start, not on the
        batch.
      waveforms: Samples from -1 to 1, 16,000 per second; see `load_wav`.
      target: The model whose distribution is sampled.
      draft: A smaller Whisper with the same vocabulary; a drafter without speech, such as `NGramDrafter`; or None.
      num_draft: Tokens drafted a step.
      language: A code such as "en". None: for each utterance, the most probable language of its first window.
      task: "transcribe" or "translate" (into English). None: "transcribe". English-only models accept neither.
      timestamps: "always": segments have times, and windows follow them. "never": windows are adjacent. "auto": like
        "always" for a sound longer than one window if the checkpoint has timestamps, else like "never".
      sampling: Scalars, applied to target and draft alike; greedy by default.
      max_new_tokens: The most tokens of a window. None: as many as the model's positions allow.
      batch_size: The most windows at once. Smaller remainders are decoded in batches of half that size, a quarter, and
        so on, so that a step is compiled for few sizes.
      verify_fn: The verification rule, as in `generate`.
      progress_fn: See `ProgressFn`.

    Raises:
      ValueError: Arguments that do not fit the models, or models that do not fit each other.
    """
    settings, config = target.settings, target.module.config
    if timestamps not in get_args(Timestamps):
        raise ValueError(f"timestamps must be one of {', '.join(get_args(Timestamps))}; got {timestamps!r}.")
    settings.check(language=language, task=task, timestamps=timestamps == "always")
    # One limit for all windows: after the longer prompt, that without timestamps, unless no window has it.
    longest = settings.max_length - settings.prompt_length(timestamps=timestamps == "always")
    if longest < 1:
        raise ValueError(f"max_length of the settings must exceed the prompt's length; got {settings.max_length}.")
    if max_new_tokens is not None and not 1 <= max_new_tokens <= longest:
        raise ValueError(f"max_new_tokens must be from 1 to {longest}, the model's limit; got {max_new_tokens}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
    if any(np.ndim(value) for value in sampling):
        raise ValueError("sampling must hold scalars, because windows are not rows of a batch; got an array.")
    if isinstance(draft, Speech):
        check_pair(target, draft)
        share_encoder(target.module, draft.module)
    keys = streams.row_keys(key, len(waveforms))
    sounds = [_sound(f"waveforms[{i}]", waveform, target, timestamps) for i, waveform in enumerate(waveforms)]

    languages = [language] * len(sounds)
    pieces: list[list[tuple[int, Piece]]] = [[] for _ in sounds]
    num_done = [0] * len(sounds)
    verify_states = []
    counts = Stats.zeros(len(sounds), 0 if draft is None else compiled_lengths(num_draft)[-1])
    for timed in (False, True):  # a batch has one kind of prompt
        # First windows come first, so that an utterance's language is detected before its later windows are decoded.
        ready = ((start, i) for i, sound in enumerate(sounds) if sound.timestamps == timed for start in sound.starts)
        queue = deque(sorted(ready))
        size = min(batch_size, len(queue))
        while queue:
            batch = [queue.popleft() for _ in range(_fitting(size, len(queue)))]
            starts, rows = (np.array(column) for column in zip(*batch, strict=True))
            features = np.stack([sounds[i].features(start) for start, i in batch])
            states = encode(target.module, features)
            model = decoder_model(target.module, states)
            if settings.languages and any(languages[i] is None for i in rows):
                for i, code in zip(rows, _detect(target, model, len(batch)), strict=True):
                    languages[i] = languages[i] or code
            prompts = np.array([settings.prompt(language=languages[i], task=task, timestamps=timed) for i in rows])
            result = generate(
                streams.fold_in(keys[rows], jnp.asarray(starts)),
                prompts,
                target=model,
                draft=_drafter(target, draft, features, states),
                num_draft=num_draft,
                max_new_tokens=max_new_tokens or longest,
                sampling=sampling,
                eos_token=settings.end_tokens,
                verify_fn=verify_fn,
                process_logits_fn=settings.rules(prompts.shape[1], timestamps=timed),
            )
            result = jax.device_get(result)
            counts = _add(counts, result.stats, rows)
            verify_states.append(result.verify_state)
            for (start, i), tokens, length in zip(batch, result.tokens, result.lengths, strict=True):
                tokens = tokens[prompts.shape[1] : length]
                found, following = sounds[i].split(tokens[~np.isin(tokens, settings.end_tokens)], start)
                pieces[i] += [(start, piece) for piece in found]
                num_done[i] = min(start + config.num_frames, sounds[i].num_frames)
                if following is not None:
                    num_done[i] = following
                    queue.append((following, i))
            if progress_fn is not None:
                progress_fn(_seconds(sum(num_done)), _seconds(sum(sound.num_frames for sound in sounds)))
    transcripts = (_transcript(target, found, code) for found, code in zip(pieces, languages, strict=True))
    return Transcription(tuple(transcripts), counts, tuple(verify_states))


def check_pair(target: Speech, draft: Speech) -> None:
    """Raises ValueError if `draft` cannot draft for `target`."""
    for name in ("vocab_size", "num_mel_bins", "max_source_positions", "max_target_positions"):
        ours, theirs = getattr(target.module.config, name), getattr(draft.module.config, name)
        if ours != theirs:
            raise ValueError(f"{name} of the drafter must be the target's, {ours}; got {theirs}.")


def _sound(name: str, waveform: np.ndarray, target: Speech, timestamps: Timestamps) -> FixedWindows | SlidingWindows:
    config, first_timestamp = target.module.config, target.settings.first_timestamp
    fixed = FixedWindows(checked(name, waveform), config)
    if first_timestamp is None or timestamps == "never":
        return fixed
    if timestamps == "auto" and fixed.num_frames <= config.num_frames:
        return fixed
    return SlidingWindows(waveform, config, first_timestamp)


def _fitting(size: int, num_ready: int) -> int:
    """The largest of `size`, its half, the half of that and so on which is at most `num_ready`."""
    while size > num_ready:
        size = (size + 1) // 2
    return size


def _drafter(target: Speech, draft: Speech | Drafter | None, features: np.ndarray, states: Array):
    if not isinstance(draft, Speech):
        return draft
    shared = draft.module.encoder is target.module.encoder
    return decoder_model(draft.module, states if shared else encode(draft.module, features))


def _detect(target: Speech, model: Model, batch_size: int) -> list[str]:
    """The most probable language of each row, from the logits after the start token."""
    codes, tokens = zip(*target.settings.languages, strict=True)
    start = jnp.full((batch_size, 1), target.settings.start_token)
    best = np.argmax(np.asarray(_first_logits(model, start))[:, list(tokens)], axis=1)
    return [codes[i] for i in best]


@jax.jit
def _first_logits(model: Model, start: Int[Array, "B 1"]) -> Float[Array, "B V"]:
    logits, _ = model.apply_fn(model.params, start, jnp.zeros_like(start), model.init_cache_fn(start.shape[0], 1))
    return logits[:, 0]


def _add(counts: Stats, new: Stats, rows: Int[np.ndarray, "B"]) -> Stats:
    """Adds a batch of windows to the counts; `rows` are the utterances of its windows, which may repeat."""
    num_emitted, status = np.array(counts.num_emitted), np.array(counts.status)
    np.add.at(num_emitted, rows, new.num_emitted)
    np.bitwise_or.at(status, rows, new.status)
    return Stats(
        counts.num_steps + new.num_steps,
        jnp.asarray(num_emitted),
        counts.num_drafted + new.num_drafted,
        counts.num_accepted + new.num_accepted,
        jnp.asarray(status),
    )


def _transcript(target: Speech, pieces: list[tuple[int, Piece]], language: str | None) -> Transcript:
    settings = target.settings
    texts = []
    for _, piece in pieces:
        shown = (
            piece.tokens if settings.first_timestamp is None else piece.tokens[piece.tokens < settings.first_timestamp]
        )
        texts.append(target.tokenizer.decode(shown.tolist(), skip_special_tokens=True))
    segments = (
        Segment(_seconds(start + piece.start), _seconds(start + piece.end), text.strip())
        for (start, piece), text in zip(pieces, texts, strict=True)
    )
    tokens = np.concatenate([np.zeros(0, np.int32), *(piece.tokens for _, piece in pieces)])
    return Transcript("".join(texts).strip(), tuple(segments), tokens, language)


def _seconds(num_frames: int) -> float:
    return num_frames * HOP / SAMPLE_RATE
