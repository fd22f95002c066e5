"""Splitting text into sentences with NLTK's Punkt (Kiss and Strunk 2006), as Megatron-LM's --split-sentences does."""

CHARACTERS_AT_ONCE = 1_000_000


def sentence_splitter(lang: str, keep_newlines: bool):
    """A function from a text to its sentences; `keep_newlines` leaves the blanks after a sentence in it.

    Long texts are cut every million characters first, as in Megatron-LM. ValueError where NLTK or its model of the
    language is not installed: nothing is downloaded unasked.
    """
    try:
        from nltk.tokenize.punkt import PunktTokenizer
    except ImportError as error:
        raise ValueError("--split-sentences needs the package nltk, which is not installed") from error
    try:
        punkt = PunktTokenizer(lang)
    except (LookupError, ValueError) as error:
        raise ValueError(f"--split-sentences --lang {lang}: NLTK has no such Punkt model here; 'python -m "
                         f"nltk.downloader punkt_tab' gets the models, NLTK_DATA says where they are") from error
    if keep_newlines:
        punkt._lang_vars = _keep_newlines()

    def split(text: str) -> list[str]:
        pieces = (text[start:start + CHARACTERS_AT_ONCE] for start in range(0, len(text), CHARACTERS_AT_ONCE))
        return [sentence for piece in pieces for sentence in punkt.tokenize(piece)]
    return split


def _keep_newlines():
    r"""Punkt's variables, but blanks belong to the sentence before them: `\s*` moves out of the lookahead."""
    from nltk.tokenize.punkt import PunktLanguageVars

    class KeepNewlines(PunktLanguageVars):
        _period_context_fmt = r"\S*%(SentEndChars)s\s*(?=(?P<after_tok>%(NonWord)s|(?P<next_tok>\S+)))"

    return KeepNewlines()
