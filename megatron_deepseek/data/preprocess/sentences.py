"""Splitting text into sentences with NLTK's Punkt (Kiss and Strunk 2006), as Megatron-LM's --split-sentences does."""

from collections.abc import Callable

from megatron_deepseek.data.preprocess.settings import Content
from megatron_deepseek.packages import how_to_install

CHARACTERS_AT_ONCE = 1_000_000


def sentence_splitter(content: Content, head: Callable[[], list[str]], say) -> Callable[[str], list[str]]:
    """Return a function from a text to its sentences; --keep-newlines leaves the blanks after a sentence in it.

    Where NLTK's model of the language is not installed (nothing is downloaded unasked), Punkt learns abbreviations and
    sentence starters from the texts of `head`, and `say` is told. Long texts are cut every million characters first, as
    in Megatron-LM. Raise ValueError where NLTK itself is missing.
    """
    try:
        import nltk
        from nltk.tokenize.punkt import PunktTokenizer
    except ImportError as error:
        raise ValueError(f"--split-sentences needs the package nltk: {how_to_install('nltk')}") from error
    if content.nltk_data_dir is not None and content.nltk_data_dir not in nltk.data.path:
        nltk.data.path.insert(0, content.nltk_data_dir)
    try:
        punkt = PunktTokenizer(content.lang)
    except (LookupError, ValueError):
        punkt = _trained_on(head(), content, say)
    if content.keep_newlines:
        punkt._lang_vars = _keep_newlines()

    def split(text: str) -> list[str]:
        pieces = (text[start:start + CHARACTERS_AT_ONCE] for start in range(0, len(text), CHARACTERS_AT_ONCE))
        return [sentence for piece in pieces for sentence in punkt.tokenize(piece)]
    return split


def _trained_on(texts: list[str], content: Content, say):
    from nltk.tokenize.punkt import PunktSentenceTokenizer, PunktTrainer
    trainer = PunktTrainer()
    for text in texts:
        trainer.train(text, finalize=False)
    trainer.finalize_training()
    found = len(trainer.get_params().abbrev_types)
    where = f" in --nltk-data-dir {content.nltk_data_dir} or" if content.nltk_data_dir else " in"
    say(f"--split-sentences --lang {content.lang}: no Punkt model of this language{where} NLTK's folders, so Punkt "
        f"learned from the first {sum(map(len, texts))} characters of the input: {found} abbreviations. For the "
        f"released model: python -m nltk.downloader punkt_tab")
    return PunktSentenceTokenizer(trainer.get_params())


def _keep_newlines():
    r"""Return Punkt's variables, but with blanks in the sentence before them: `\s*` moves out of the lookahead."""
    from nltk.tokenize.punkt import PunktLanguageVars

    class KeepNewlines(PunktLanguageVars):
        _period_context_fmt = r"\S*%(SentEndChars)s\s*(?=(?P<after_tok>%(NonWord)s|(?P<next_tok>\S+)))"

    return KeepNewlines()
