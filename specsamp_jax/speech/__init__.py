"""Speech to text: reads sound files, cuts them into windows, and transcribes them with a Whisper and a drafter."""

from specsamp_jax.speech.audio import load_wav as load_wav
from specsamp_jax.speech.audio import resample as resample
from specsamp_jax.speech.checkpoint import Speech as Speech
from specsamp_jax.speech.checkpoint import load_speech as load_speech
from specsamp_jax.speech.fallback import Fallback as Fallback
from specsamp_jax.speech.languages import language_code as language_code
from specsamp_jax.speech.sound_files import load_audio as load_audio
from specsamp_jax.speech.subtitles import to_srt as to_srt
from specsamp_jax.speech.subtitles import to_vtt as to_vtt
from specsamp_jax.speech.transcript import Segment as Segment
from specsamp_jax.speech.transcript import Transcript as Transcript
from specsamp_jax.speech.transcript import Transcription as Transcription
from specsamp_jax.speech.transcription import Timestamps as Timestamps
from specsamp_jax.speech.transcription import check_pair as check_pair
from specsamp_jax.speech.transcription import transcribe as transcribe
from specsamp_jax.speech.words import Word as Word
