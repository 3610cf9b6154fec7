"""The newsroom's tokenizer: one id per word of its closed vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.newsroom import summaries, world
from trimtab.newsroom.lexicon import names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIALS = (PAD, BOS, EOS, UNK)
"""Ids 0, 1, 2, 3."""


def vocabulary() -> list[str]:
    """The specials, then every word of every article, prompt and summary in sorted order."""
    texts = [*world.templates(), *summaries.OPENINGS, *summaries.CLOSINGS, *summaries.PHRASES.values()]
    ordinary = {word for text in texts for word in text.split() if not word.startswith("{")}
    return [*SPECIALS, *sorted(ordinary | {"and", "."} | set(names()))]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-cases, splits at white space and punctuation, and looks words up; adds no BOS and no EOS.

    ``decode`` joins by single spaces, which is the form of every newsroom text: decoding an encoded
    text gives it back. A prompt and its completion tokenise alike with or without a space between.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate(vocabulary())}
    core = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
