"""Tokenizers and chat templates of checkpoints, and text from tokens that arrive one at a time."""

from specsamp_jax.text.chat import render_chat as render_chat
from specsamp_jax.text.stops import StopStream as StopStream
from specsamp_jax.text.stream import TextStream as TextStream
from specsamp_jax.text.tokenizer import CheckpointTokenizer as CheckpointTokenizer
from specsamp_jax.text.tokenizer import load_tokenizer as load_tokenizer
from specsamp_jax.text.vocabulary import check_vocabularies as check_vocabularies
