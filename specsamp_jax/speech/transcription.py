"""Transcription of many utterances at once, by speculative decoding."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from specsamp_jax._types import Generation, Model, SamplingParams, Stats
from specsamp_jax.decoding.drafters import Drafter
from specsamp_jax.decoding.generate import generate
from specsamp_jax.decoding.num_draft import NumDraft, compiled_lengths
from specsamp_jax.decoding.stateful_rule import VerifyFn
from specsamp_jax.models.whisper.checkpoint import share_encoder
from specsamp_jax.models.whisper.features import checked
from specsamp_jax.models.whisper.model import decoder_model, encode
from specsamp_jax.rules.verify import verify
from specsamp_jax.sampling import streams
from specsamp_jax.speech.checkpoint import Speech
from specsamp_jax.speech.fallback import AGAIN, KEEP, SILENT, Fallback, check, judge, mean_log_probs
from specsamp_jax.speech.languages import language_code
from specsamp_jax.speech.transcript import Transcription, join_pieces, seconds, text_of
from specsamp_jax.speech.windows import STEP, FixedWindows, Piece, SlidingWindows, with_edges
from specsamp_jax.speech.word_times import token_edges

Timestamps = Literal["auto", "always", "never", "word"]
"""Which sounds are decoded with timestamps: with "auto" those longer than one window. "word": all, with word times."""

ProgressFn = Callable[[float, float], None]
"""Called as `(seconds done, seconds in total)` after each batch of windows."""


class _Window(NamedTuple):
    """A window to decode.

    Attributes:
      start: Its first frame.
      row: The index of its utterance.
      attempt: How often it was decoded before.
      states: The encoder's states, if it was.
    """

    start: int
    row: int
    attempt: int = 0
    states: Float[Array, "1 S D"] | None = None


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
    fallback: Fallback | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 8,
    verify_fn: VerifyFn = verify,
    progress_fn: ProgressFn | None = None,
) -> Transcription:
    """Returns the text of each utterance, with the distribution of the target's own sampling.

    Up to `batch_size` windows, of one or several utterances, are decoded together; windows have 30 s in all published
    models. Without timestamps the windows of an utterance are adjacent, and words at their edges are lost. With
    timestamps each begins at the end of the last segment of the one before, so a batch holds one window per utterance.
    Windows are decoded independently. With `fallback`, silent ones have no text, and doubtful ones are decoded again at
    higher temperatures, so that the distribution is that of the procedure of Radford et al. (2022).

    If the drafter's encoder equals the target's, it runs once for both; see `share_encoder`.

    Args:
      key: A key, or one per utterance. The draws of a window depend on its utterance's key, its start and how often it
        was decoded before, not on the batch.
      waveforms: Samples from -1 to 1, 16,000 per second; see `load_wav`.
      target: The model whose distribution is sampled.
      draft: A smaller Whisper with the same vocabulary; a drafter without speech, such as `NGramDrafter`; or None.
      num_draft: Tokens drafted a step.
      language: A code or a name, as in `language_code`. None: for each utterance, the most probable language of its
        first window.
      task: "transcribe" or "translate" (into English). None: "transcribe". English-only models accept neither.
      timestamps: "always": segments have times, and windows follow them. "never": windows are adjacent. "auto": like
        "always" for a sound longer than one window if the checkpoint has timestamps, else like "never". "word": like
        "always", and segments have words with times, of which more in `token_edges`; the decoder reads each text again.
      sampling: Scalars, applied to target and draft alike; greedy by default.
      fallback: Thresholds and temperatures; `Fallback()` has the published ones. None: every window is decoded once.
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
    if language is not None:
        language = language_code(language, list(dict(settings.languages)))
    always = timestamps in ("always", "word")
    settings.check(language=language, task=task, timestamps=always)
    heads = settings.heads(config) if timestamps == "word" else ()
    # One limit for all windows: after the longer prompt, that without timestamps, unless no window has it.
    longest = settings.max_length - settings.prompt_length(timestamps=always)
    if longest < 1:
        raise ValueError(f"max_length of the settings must exceed the prompt's length; got {settings.max_length}.")
    if max_new_tokens is not None and not 1 <= max_new_tokens <= longest:
        raise ValueError(f"max_new_tokens must be from 1 to {longest}, the model's limit; got {max_new_tokens}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
    if any(np.ndim(value) for value in sampling):
        raise ValueError("sampling must hold scalars, because windows are not rows of a batch; got an array.")
    if fallback is not None:
        check(fallback, settings.no_speech_token)
    temperatures = [sampling.temperature, *(fallback.temperatures if fallback is not None else ())]
    if isinstance(draft, Speech):
        check_pair(target, draft)
        share_encoder(target.module, draft.module)
    keys = streams.row_keys(key, len(waveforms))
    sounds = [_sound(f"waveforms[{i}]", waveform, target, timestamps) for i, waveform in enumerate(waveforms)]

    languages = [language] * len(sounds)
    pieces: list[list[tuple[int, Piece]]] = [[] for _ in sounds]
    num_done = [0] * len(sounds)
    verify_states = []
    num_again = num_silent = 0
    counts = Stats.zeros(len(sounds), 0 if draft is None else compiled_lengths(num_draft)[-1])
    for timed in (False, True):  # a batch has one kind of prompt
        # First windows come first, so that an utterance's language is detected before its later windows are decoded.
        ready = ((start, i) for i, sound in enumerate(sounds) if sound.timestamps == timed for start in sound.starts)
        queue = deque(_Window(start, i) for start, i in sorted(ready))
        size = min(batch_size, len(queue))
        while queue:
            batch = [queue.popleft() for _ in range(_fitting(size, len(queue)))]
            rows = np.array([window.row for window in batch])
            features = np.stack([sounds[i].features(start) for start, i, *_ in batch])
            states = _states(target, batch, features)
            model = decoder_model(target.module, states)
            is_unknown = bool(settings.languages) and any(languages[i] is None for i in rows)
            first_probs = _first_probs(model, settings.start_token, len(batch)) if is_unknown or fallback else None
            if is_unknown and first_probs is not None:
                for i, code in zip(rows, _detect(target, first_probs), strict=True):
                    languages[i] = languages[i] or code
            prompts = np.array([settings.prompt(language=languages[i], task=task, timestamps=timed) for i in rows])
            rules = settings.rules(prompts.shape[1], timestamps=timed)
            result = generate(
                _window_keys(keys[rows], batch),
                prompts,
                target=model,
                draft=_drafter(target, draft, features, states),
                num_draft=num_draft,
                max_new_tokens=max_new_tokens or longest,
                sampling=sampling._replace(temperature=jnp.array([temperatures[window.attempt] for window in batch])),
                eos_token=settings.end_tokens,
                verify_fn=verify_fn,
                process_logits_fn=rules,
            )
            result = jax.device_get(result)
            counts = _add(counts, result.stats, rows)
            verify_states.append(result.verify_state)
            texts = _texts(target, result, prompts.shape[1])
            verdicts = [KEEP] * len(batch)
            if fallback is not None and first_probs is not None:
                log_probs = mean_log_probs(model, result.tokens, result.lengths, prompts.shape[1], rules)
                no_speech = first_probs[:, settings.no_speech_token or 0]
                shown = (text_of(target, tokens) for tokens in texts)
                measures = zip(shown, log_probs.tolist(), no_speech.tolist(), strict=True)
                verdicts = [judge(fallback, *measure) for measure in measures]
                if fallback.no_speech_threshold is not None:
                    empty = [sounds[window.row].is_empty(window.start) for window in batch]
                    verdicts = [SILENT if e else verdict for e, verdict in zip(empty, verdicts, strict=True)]
            edges = None
            if timestamps == "word":
                num_frames = np.array([sounds[i].num_frames - start for start, i, *_ in batch])
                edges = token_edges(
                    model,
                    result.tokens,
                    result.lengths,
                    np.minimum(num_frames // STEP, config.max_source_positions),
                    begin=prompts.shape[1],
                    heads=heads,
                    filter_width=config.median_filter_width,
                )
            for n, (window, tokens, verdict) in enumerate(zip(batch, texts, verdicts, strict=True)):
                start, i = window.start, window.row
                if verdict == AGAIN and window.attempt + 1 < len(temperatures):
                    num_again += 1
                    queue.appendleft(window._replace(attempt=window.attempt + 1, states=states[n : n + 1]))
                    continue
                num_silent += verdict == SILENT
                found, following = sounds[i].split(tokens[:0] if verdict == SILENT else tokens, start)
                found = with_edges(found, edges[n]) if edges is not None else found
                pieces[i] += [(start, piece) for piece in found]
                num_done[i] = min(start + config.num_frames, sounds[i].num_frames)
                if following is not None:
                    num_done[i] = following
                    queue.append(_Window(following, i))
            if progress_fn is not None:
                progress_fn(seconds(sum(num_done)), seconds(sum(sound.num_frames for sound in sounds)))
    transcripts = [
        join_pieces(target, sorted(found, key=lambda piece: piece[0]), code)
        for found, code in zip(pieces, languages, strict=True)
    ]
    return Transcription(tuple(transcripts), counts, tuple(verify_states), num_again, num_silent)


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


def _states(target: Speech, batch: Sequence[_Window], features: np.ndarray) -> Float[Array, "B S D"]:
    """The encoder's states of each window; those of a window that is decoded again are kept in it."""
    states = [
        encode(target.module, features[n : n + 1]) if window.states is None else window.states
        for n, window in enumerate(batch)
    ]
    return jnp.concatenate(states)


def _window_keys(keys: Key[Array, "B"], batch: Sequence[_Window]) -> Key[Array, "B"]:
    """Each utterance's key folded with the start of its window, after its attempt if that is not the first."""
    attempts = np.array([window.attempt for window in batch])
    if attempts.any():
        # Starts are not negative: no window's first key is equal to the key of an attempt.
        keys = jnp.where(attempts > 0, streams.fold_in(keys, jnp.asarray(-attempts)), keys)
    return streams.fold_in(keys, jnp.array([window.start for window in batch]))


def _texts(target: Speech, result: Generation, begin: int) -> list[Int[np.ndarray, "_"]]:
    """The generated tokens of each row without end tokens."""
    rows = zip(result.tokens, result.lengths, strict=True)
    texts = [np.asarray(tokens[begin:length]) for tokens, length in rows]
    return [tokens[~np.isin(tokens, target.settings.end_tokens)] for tokens in texts]


def _detect(target: Speech, first_probs: Float[np.ndarray, "B V"]) -> list[str]:
    """The most probable language of each row after the start token."""
    codes, tokens = zip(*target.settings.languages, strict=True)
    best = np.argmax(first_probs[:, list(tokens)], axis=1)
    return [codes[i] for i in best]


def _first_probs(model: Model, start_token: int, batch_size: int) -> Float[np.ndarray, "B V"]:
    """The probabilities after the start token, before rules."""
    return np.asarray(_softmax_of_first(model, jnp.full((batch_size, 1), start_token)))


@jax.jit
def _softmax_of_first(model: Model, start: Int[Array, "B 1"]) -> Float[Array, "B V"]:
    logits, _ = model.apply_fn(model.params, start, jnp.zeros_like(start), model.init_cache_fn(start.shape[0], 1))
    return jax.nn.softmax(logits[:, 0], axis=1)


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
