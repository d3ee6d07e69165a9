"""The rows of the experiments that count, and the sentences of further training speech."""

import json

import asr_data
import asr_spoken
import numpy as np
import pytest
import score


def word_errors(references, texts):
    """Word errors of texts as long as their references, which need no jiwer."""
    pairs = [(reference.split(), text.split()) for reference, text in zip(references, texts, strict=True)]
    return np.array([[[sum(map(str.__ne__, *pair))], [len(pair[0])]] for pair in pairs], float)


def written(folder, rows):
    (folder / "task.json").write_text(
        json.dumps(
            {"models": "m", "metric": "wer", "references": ["a b"] * 2, "trivial": ["a"] * 2, "groups": ["g"] * 2}
        )
    )
    (folder / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables = score.Tables(folder)
    tables.score_fn = word_errors
    tables.add_texts()
    return next(row for row in tables.rows if row["kind"] == "text")


def text_row(seed, texts, drafted, accepted, seconds, **more):
    counts = {"calls": 2, "row_calls": 4, "drafted": [drafted], "accepted": [accepted], "calibration": {}}
    name = f"ours|model|1.0|0|float32|8|5|{seed}"
    return {"name": name, **counts, "seconds": seconds, "num_tokens": [3, 3], "texts": texts, **more}


def test_times_are_of_rows_that_had_the_gpu_alone_and_acceptance_of_drafts_within_texts(tmp_path):
    new = {"kernels": "on", "drafts": "counted within texts"}
    found = written(
        tmp_path,
        [
            text_row(0, ["a b", "a b"], 10, 5, 1.0, **new),
            text_row(1, ["a b", "a b"], 10, 7, 9.0, shared=True, **new),
            text_row(2, ["a c", "a c"], 80, 8, 4.0, kernels="off"),
        ],
    )
    assert found["ms"] == 500
    assert "ms_range" not in found
    assert found["accepted"] == 0.6
    assert found["seeds"] == 3
    np.testing.assert_allclose(found["quality"][0], 100 / 6, rtol=1e-3)


def test_older_rows_count_where_there_are_no_others(tmp_path):
    found = written(tmp_path, [text_row(0, ["a b", "a b"], 10, 5, 1.0, kernels="off")])
    assert found["accepted"] == 0.5
    assert found["ms"] == 500


def test_sentences_of_further_speech_share_no_five_words_with_the_test(tmp_path):
    file = tmp_path / "sentences.txt"
    file.write_text("Please enter your own number now.\n" + "".join(f"Sentence {word}.\n" for word in "abcdefgh"))
    refused = asr_data.shingles("please enter your own number")
    found = asr_spoken.read_sentences(file, 7, refused)
    # The first of six utterances has two sentences.
    assert found[:2] == ["Sentence a. Sentence b.", "Sentence c."]
    assert len(found) == 7
    with pytest.raises(ValueError, match="must have sentences for 9 utterances, it has 7"):
        asr_spoken.read_sentences(file, 9, refused)
