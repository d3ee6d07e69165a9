"""Names of languages, as Whisper's codes."""

import difflib
import re
from collections.abc import Sequence

# Codes and English names of the languages of the published multilingual models; the last three lines are other names.
_NAMES = """
af afrikaans|am amharic|ar arabic|as assamese|az azerbaijani|ba bashkir|be belarusian|bg bulgarian|bn bengali|bo tibetan
br breton|bs bosnian|ca catalan|cs czech|cy welsh|da danish|de german|el greek|en english|es spanish|et estonian
eu basque|fa persian|fi finnish|fo faroese|fr french|gl galician|gu gujarati|ha hausa|haw hawaiian|he hebrew|hi hindi
hr croatian|ht haitian creole|hu hungarian|hy armenian|id indonesian|is icelandic|it italian|ja japanese|jw javanese
ka georgian|kk kazakh|km khmer|kn kannada|ko korean|la latin|lb luxembourgish|ln lingala|lo lao|lt lithuanian
lv latvian|mg malagasy|mi maori|mk macedonian|ml malayalam|mn mongolian|mr marathi|ms malay|mt maltese|my burmese
ne nepali|nl dutch|nn nynorsk|no norwegian|oc occitan|pa punjabi|pl polish|ps pashto|pt portuguese|ro romanian
ru russian|sa sanskrit|sd sindhi|si sinhala|sk slovak|sl slovenian|sn shona|so somali|sq albanian|sr serbian
su sundanese|sv swedish|sw swahili|ta tamil|te telugu|tg tajik|th thai|tk turkmen|tl tagalog|tr turkish|tt tatar
uk ukrainian|ur urdu|uz uzbek|vi vietnamese|yi yiddish|yo yoruba|yue cantonese|zh chinese
my myanmar|ca valencian|nl flemish|ht haitian|lb letzeburgesch|ps pushto|pa panjabi|ro moldavian|ro moldovan
si sinhalese|es castilian|zh mandarin|tl filipino|fa farsi|jw jv|no nb|he iw
"""
_CODES = {name: code for code, _, name in (entry.partition(" ") for entry in re.split(r"[|\n]", _NAMES.strip()))}


def language_code(language: str, codes: Sequence[str]) -> str:
    """Returns the code of a language.

    Args:
      language: A code, an English name, or a code with a region, such as "en", "English", "EN" or "en-US".
      codes: The codes of the checkpoint. Empty for an English-only model: `language` is returned.

    Raises:
      ValueError: The checkpoint has no such language; the sentence suggests similar ones.

    Example:
      >>> language_code("English", ["de", "en"]), language_code("de-AT", ["de", "en"])
      ('en', 'de')
    """
    if not codes:
        return language
    asked = language.strip().lower()
    bare = re.split("[-_]", asked)[0]
    for code in (asked, _CODES.get(asked, ""), bare, _CODES.get(bare, "")):
        if code in codes:
            return code
    names = [name for name, code in _CODES.items() if code in codes]
    similar = difflib.get_close_matches(asked, [*names, *codes], n=3)
    hint = f" Did you mean {' or '.join(map(repr, similar))}?" if similar else ""
    raise ValueError(f"language must be one of {', '.join(codes)}, got {language!r}.{hint}")
