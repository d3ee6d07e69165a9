"""Compares the vocabularies of a target and a drafter."""

from tokenizers import Tokenizer


def check_vocabularies(target: Tokenizer, draft: Tokenizer) -> None:
    """Raises if a token id stands for different tokens in the two vocabularies.

    The text would still have the target's distribution, but few drafts would be accepted. Ids in only one of the
    vocabularies are harmless: `specsamp_jax.models.with_vocab_size` gives the drafter the target's number of logits.

    Args:
      target: The target's tokenizer.
      draft: The drafter's.

    Raises:
      ValueError: The vocabularies differ; the message names the first differing id.

    Example:
      >>> from specsamp_jax.cli.pair import load_pair
      >>> tokenizer = load_pair().tokenizer
      >>> check_vocabularies(tokenizer, tokenizer)
    """
    by_id = [{i: token for token, i in tokenizer.get_vocab().items()} for tokenizer in (target, draft)]
    shared = by_id[0].keys() & by_id[1].keys()
    differing = sorted(i for i in shared if by_id[0][i] != by_id[1][i])
    if differing:
        first = differing[0]
        raise ValueError(
            f"target and draft must share a vocabulary: {len(differing)} of {len(shared)} token ids differ, "
            f"the first is {first}, which is {by_id[0][first]!r} to the target and {by_id[1][first]!r} to the draft."
        )
