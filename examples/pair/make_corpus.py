"""Makes the tokenizer and the token streams that the small pair is trained on, from what make_corpus_env.sh unpacked.

Writes specsamp_jax/cli/assets/tokenizer.json, .work/pair/{train,held_out}.npy (uint16) and .work/pair/corpus.json.
The same packages, and the same Python, give the same files.
"""

import json
import random
from collections import Counter
from pathlib import Path

import corpus
import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from specsamp_jax.cli import docstrings

ROOT = Path(__file__).parents[2]
PACKAGES = ROOT / ".work" / "packages"
OUT = ROOT / ".work" / "pair"
VOCABULARY_SIZE = 4096
SEED = 0

# Words with what precedes them, digits by threes, punctuation, then white space: a line break takes along the
# indentation that follows, but for the last space, which belongs to the next word.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+(?: *(?= ))?|\s+(?!\S)|\s+"


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE: every text comes back exactly, and `END_TOKEN` is token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[docstrings.END_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenize(tokenizer: Tokenizer, documents: list[docstrings.Docstring]) -> list[np.ndarray]:
    """Each document's tokens, the begin mark first."""
    encodings = tokenizer.encode_batch_fast([document.text for document in documents], add_special_tokens=False)
    end = tokenizer.token_to_id(docstrings.END_TOKEN)
    return [np.array([end, *encoding.ids], np.uint16) for encoding in encodings]


def main() -> None:
    # A dictionary as an ordered set: which package each document came from.
    package_of = dict.fromkeys(docstrings.docstrings(docstrings.standard_library(), ""), "(standard library)")
    for folder in sorted(PACKAGES.iterdir()):
        package_of |= dict.fromkeys(docstrings.docstrings(folder, ""), folder.name)

    held_out_found = [document for document in package_of if docstrings.is_held_out(document.path)]
    train_found = [document for document in package_of if not docstrings.is_held_out(document.path)]
    held_out = list(corpus.without_duplicates(held_out_found))
    train_distinct = list(corpus.without_duplicates(train_found))
    train = list(corpus.without_overlap(train_distinct, held_out))
    shuffle = random.Random(SEED).shuffle
    shuffle(train)
    shuffle(held_out)

    tokenizer = train_tokenizer([document.text for document in train])
    docstrings.TOKENIZER_FILE.parent.mkdir(exist_ok=True)
    tokenizer.save(str(docstrings.TOKENIZER_FILE), pretty=False)

    OUT.mkdir(parents=True, exist_ok=True)
    report = {
        "found": {"train": len(train_found), "held_out": len(held_out_found)},
        "dropped": {
            "train_duplicates": len(train_found) - len(train_distinct),
            "train_overlaps": len(train_distinct) - len(train),
            "held_out_duplicates": len(held_out_found) - len(held_out),
        },
    }
    for split, documents in (("train", train), ("held_out", held_out)):
        tokens = tokenize(tokenizer, documents)
        np.save(OUT / f"{split}.npy", np.concatenate(tokens))
        counts = {name: Counter() for name in ("files", "docstrings", "bytes", "tokens")}
        counts["files"].update({document.path: package_of[document] for document in documents}.values())
        for document, ids in zip(documents, tokens, strict=True):
            counts["docstrings"][package_of[document]] += 1
            counts["bytes"][package_of[document]] += len(document.text.encode())
            counts["tokens"][package_of[document]] += len(ids)
        total = {name: counter.total() for name, counter in counts.items()}
        print(split, total, f"{total['bytes'] / total['tokens']:.3f} bytes a token")
        by_package = {name: dict(sorted(counter.items())) for name, counter in counts.items()}
        report |= {split: total, f"{split}_by_package": by_package}
    (OUT / "corpus.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
