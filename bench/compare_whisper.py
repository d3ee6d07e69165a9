"""Speed of Whisper with a distilled drafter beside transformers: writes results/whisper_DEVICE.{json,md}.

python bench/compare_whisper.py
"""

import json
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np
import timing
from flax import nnx
from gpu import results

import specsamp_jax as ss
from specsamp_jax.decoding.stats import accepted_by_position
from specsamp_jax.models import load_module, save_checkpoint
from specsamp_jax.models.whisper.checkpoint import share_encoder
from specsamp_jax.models.whisper.model import Whisper, WhisperConfig, decoder_model, encode
from specsamp_jax.models.whisper.settings import load_settings

NUM_DRAFT, MAX_NEW_TOKENS = 5, 128
GOAL = 2.0  # decoding tokens per second at batch 1, relative to transformers' assisted generation
QUIET = 0.05  # scale of the decoder layers that the drafter lacks; the smaller, the more drafts are accepted
REFERENCE = "speculative"
FOLDER = timing.ROOT / ".work" / "whisper"
# The decoder has the same share of the weights (head excluded) as in Whisper small; vocabulary and width are smaller.
CONFIG = WhisperConfig(
    vocab_size=8192,
    d_model=256,
    encoder_layers=4,
    encoder_attention_heads=4,
    encoder_ffn_dim=1024,
    decoder_layers=4,
    decoder_attention_heads=4,
    decoder_ffn_dim=1024,
)
DRAFT_LAYERS = 1
FIRST_TIMESTAMP = CONFIG.vocab_size - 1501
END, START, ENGLISH, TRANSCRIBE, NO_TIMESTAMPS = range(FIRST_TIMESTAMP - 5, FIRST_TIMESTAMP)
SETTINGS = {
    "decoder_start_token_id": START,
    "eos_token_id": END,
    "pad_token_id": END,
    "bos_token_id": END,
    "no_timestamps_token_id": NO_TIMESTAMPS,
    "is_multilingual": True,
    "lang_to_id": {"<|en|>": ENGLISH},
    "task_to_id": {"transcribe": TRANSCRIBE},
    # The end token is suppressed, too: every run generates the same number of tokens.
    "suppress_tokens": [END, START, ENGLISH, TRANSCRIBE],
    "begin_suppress_tokens": [0],
    "max_length": CONFIG.max_target_positions,
}


def make_pair() -> tuple[Path, Path]:
    """Folders of a target and of the drafter that is its encoder and first decoder layer."""
    target = Whisper(CONFIG, rngs=nnx.Rngs(0))
    keys = iter(jax.random.split(jax.random.key(0), 200))

    def draw(path, value):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if value.ndim == 1 or name == "encoder/positions":
            return value
        lacking = name.startswith("decoder/blocks/") and not name.startswith("decoder/blocks/0/")
        scale = QUIET if lacking and ("/out/" in name or "/down/" in name) else 1.0
        if name == "decoder/vocabulary/head":
            scale = 0.1  # smaller than the signal of position and audio, or the tied head would repeat the last token
        if name.endswith("weight"):
            scale *= (value.size // value.shape[0] if "conv" in name else value.shape[0]) ** -0.5
        return scale * jax.random.normal(next(keys), value.shape)

    state = nnx.state(target)
    nnx.replace_by_pure_dict(state, jax.tree.map_with_path(draw, nnx.to_pure_dict(state)))
    nnx.update(target, state)
    draft = Whisper(WhisperConfig(**{**vars(CONFIG), "decoder_layers": DRAFT_LAYERS}), rngs=nnx.Rngs(0))
    draft.encoder = target.encoder
    for name in ("vocabulary", "positions", "norm"):
        setattr(draft.decoder, name, getattr(target.decoder, name))
    draft.decoder.blocks = nnx.List(list(target.decoder.blocks)[:DRAFT_LAYERS])
    folders = FOLDER / "target", FOLDER / "draft"
    for folder, module in zip(folders, (target, draft), strict=True):
        save_checkpoint(folder, module, dtype="float32")
        (folder / "generation_config.json").write_text(json.dumps(SETTINGS))
    return folders


def contender(
    name: str, modules: tuple[Whisper, Whisper], features: np.ndarray, *, is_encoded: bool
) -> timing.Contender:
    """Greedy decoding of new utterances in each round. With `is_encoded` the encoder runs outside the timed call."""
    target, draft = modules
    settings = load_settings(FOLDER / "target", CONFIG)
    prompt = np.array([settings.prompt(language="en", task=None, timestamps=False)] * features.shape[1])
    rules = settings.rules(prompt.shape[1], timestamps=False)

    def run(key, heard):
        states = heard if is_encoded else encode(target, heard)
        return ss.generate(
            key,
            prompt,
            target=decoder_model(target, states),
            draft=decoder_model(draft, states) if name == REFERENCE else None,
            num_draft=NUM_DRAFT,
            max_new_tokens=MAX_NEW_TOKENS,
            sampling=ss.SamplingParams(temperature=0.0),
            eos_token=settings.end_tokens,
            process_logits_fn=rules,
        )

    def arguments(index):
        heard = features[index % len(features)]
        return jax.random.key(0), encode(target, heard) if is_encoded else heard

    return timing.jax_contender(name, run, arguments)


def compare(peers: timing.Peers | None, batch_size: int, *, rounds: int, is_encoded: bool) -> dict[str, Any]:
    """Checks that all contenders produce equal texts, then times them on new audio in each round."""
    rng = np.random.default_rng(batch_size)
    shape = (rounds, batch_size, CONFIG.num_mel_bins, CONFIG.num_frames)
    features = rng.normal(0, 0.5, shape).astype(np.float32)
    np.save(FOLDER / "features.npy", features)
    modules = load_module(FOLDER / "target", dtype="float32"), load_module(FOLDER / "draft", dtype="float32")
    if share_encoder(*modules) is not None:
        raise ValueError("The drafter must have the target's encoder.")
    contenders = [contender(name, modules, features, is_encoded=is_encoded) for name in (REFERENCE, "target_alone")]
    arguments: dict[str, Any] = {"features": str(FOLDER / "features.npy"), "max_new_tokens": MAX_NEW_TOKENS}
    arguments["is_encoded"] = is_encoded
    arguments |= {"target": str(FOLDER / "target"), "drafter": str(FOLDER / "draft")}
    for name, num_draft in (("transformers_assisted", NUM_DRAFT), ("transformers_generate", None)):
        if peers and (num_draft is None or batch_size == 1):
            contenders.append(
                peers.contender(
                    f"{name}_{batch_size}{'_encoded' * is_encoded}", "whisper", num_draft=num_draft, **arguments
                )
            )
    counts, texts = {}, {}
    for each in contenders:
        _, made = each.run_fn(range(rounds))
        peer = isinstance(made[0], dict)
        texts[each.name] = np.array([m["tokens"] if peer else m.tokens for m in made])
        steps = sum(m["num_steps"] if peer else int(m.stats.num_steps) for m in made)
        counts[each.name] = {"tokens_per_step": rounds * MAX_NEW_TOKENS / steps}
        if not peer and each.name == REFERENCE:
            drafted, accepted = (
                np.sum([getattr(m.stats, f"num_{n}") for m in made], 0) for n in ("drafted", "accepted")
            )
            counts[each.name]["accepted"] = accepted_by_position(drafted, accepted)
    for name, text in texts.items():
        counts[name]["same_tokens"] = float((text == texts["target_alone"]).mean())
    seconds = timing.alternate(contenders, lambda i, _: [i], rounds=rounds)
    result = timing.summary(seconds, dict.fromkeys(seconds, REFERENCE))
    for name, entry in result.items():
        rates = [batch_size * MAX_NEW_TOKENS / value for value in entry["rounds"]]
        entry |= {"tokens_per_second": timing.spread(rates), **counts[name]}
    return result


def goal_lines(result: dict[str, Any]) -> list[str]:
    """Markdown lines with the speed-up of decoding at batch 1 and the goal."""
    times = [e["times_reference"]["median"] for name, e in result.items() if name.startswith("transformers_assisted")]
    if not times:
        return []
    met = "met" if times[0] >= GOAL else "not met"
    return [f"Decoding: {times[0]:.2f} times transformers' assisted generation (goal {GOAL}: {met}).", ""]


def batch_lines(title: str, result: dict[str, Any]) -> list[str]:
    """Markdown section for one batch size."""
    rows = [
        [
            name,
            f"{entry['tokens_per_second']['median']:.0f}",
            f"{entry['tokens_per_second']['p10']:.0f} to {entry['tokens_per_second']['p90']:.0f}",
            f"{entry['times_reference']['median']:.2f} x",
            f"{entry['tokens_per_step']:.2f}",
            f"{entry['same_tokens']:.3f}",
        ]
        for name, entry in result.items()
    ]
    header = ["contender", "tokens/s", "p10 to p90", f"time over {REFERENCE}", "tokens per step", "same tokens"]
    accepted = " ".join(f"{rate:.2f}" for rate in result[REFERENCE]["accepted"])
    return [f"## {title}", "", *results.table(header, rows), "", f"Accepted by position: {accepted}.", ""]


NOTES = f"""\
A random Whisper in float32, {CONFIG.encoder_layers} + {CONFIG.decoder_layers} layers of width {CONFIG.d_model},
vocabulary {CONFIG.vocab_size}, windows of 30 s. The drafter has the same encoder and the first {DRAFT_LAYERS} of the
decoder layers; the target's other layers have small weights, so that many drafts are accepted. Greedy, K =
{NUM_DRAFT}, {MAX_NEW_TOKENS} tokens, with suppressed tokens. Each round has new random audio, the same for all
contenders. "whole": from features to text, the encoder included. "decoding": `generate` after the encoder, whose
cost does not depend on drafting; prefill and the keys and values of the encoder's states are included. The drafter
of transformers shares the encoder's states as ours does. "same tokens": the share of tokens equal to those of our
target alone. Medians over the rounds, first and last decile."""


@click.command()
@click.option("--batch", "batch_sizes", multiple=True, type=int, default=[1, 8])
@click.option("--rounds", default=6)
@click.option("--out", type=click.Path(path_type=Path), help="Without suffix; results/whisper_DEVICE unless given.")
def main(batch_sizes: tuple[int, ...], rounds: int, out: Path | None) -> None:
    about = timing.environment()
    make_pair()
    peers = timing.Peers() if timing.Peers.are_installed() else None
    watch = timing.Watch(*([peers.pid] if peers else []))
    results = {
        (name, batch_size): compare(peers, batch_size, rounds=rounds, is_encoded=name == "decoding")
        for batch_size in batch_sizes
        for name in ("decoding", "whole")
    }
    about["others"] = watch.others()
    if peers:
        about["peers"] = peers.about
        peers.close()
    lines = ["# Whisper", "", *timing.environment_lines(about), "", *NOTES.splitlines(), ""]
    lines += goal_lines(results.get(("decoding", 1), {}))
    for (name, batch_size), result in results.items():
        lines += batch_lines(f"Batch {batch_size}, {name}", result)
    rows = [
        timing.result_row({"timed": timed, "batch_size": batch_size, "contender": name}, entry)
        for (timed, batch_size), result in results.items()
        for name, entry in result.items()
    ]
    timing.write(out or timing.RESULTS / f"whisper_{about['platform']}", about, rows, lines)


if __name__ == "__main__":
    main()
