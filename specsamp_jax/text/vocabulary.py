"""Whether a target and a drafter mean the same by a token."""

from tokenizers import Tokenizer


def check_vocabularies(target: Tokenizer, draft: Tokenizer) -> None:
    """Raises where a token id is one token to the target and another one to the drafter.

    The text would have the target's distribution all the same, but hardly a draft would be accepted. Ids that only
    one of the two knows do no harm: `specsamp_jax.models.with_vocab_size` gives the drafter the target's number.

    Args:
      target: The target's tokenizer.
      draft: The drafter's.

    Raises:
      ValueError: The vocabularies differ, with the first id where they do.

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
