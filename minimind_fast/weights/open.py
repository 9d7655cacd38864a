"""A model and the tokenizer that belongs to it: the one place where the two are matched.

Purpose: `tokenizer_of` finds the tokenizer of weights, `check_match` refuses one that is not theirs. Training, the commands
    and distillation ask here.
Principle: weights remember the fingerprint of the tokenizer that they were trained with; a folder of another program says
    it by the tokenizer.json that lies in it.
Properties: the same ids never silently mean other words.
"""

from __future__ import annotations

from pathlib import Path

from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.weights.checkpoint import check_exists, tokenizer_fingerprint


def tokenizer_of(weights: Path | None, given: str | Path | None, option: str, default: Path | None = None) -> Tokenizer:
    """The tokenizer that was given, else that of the weights, else the default.

    Args:
        weights: folder or file, or None for a new model.
        given: folder of a tokenizer, or nothing.
        option: that it is given with, for errors, such as "--tokenizer_path".
        default: of a new model.

    Raises:
        ValueError: none can be found, or what is there is no tokenizer.
    """
    if given:
        return Tokenizer.load(given)
    if weights is None:
        if default is None:
            raise ValueError(f"give {option}, a folder with tokenizer.json")
        return Tokenizer.load(default)
    check_exists(weights)
    if not (weights / "tokenizer.json").is_file():
        raise ValueError(f"{weights} has no tokenizer with it: give {option}, the folder that it was trained with")
    return Tokenizer.load(weights)


def check_match(weights: Path, tokenizer: Tokenizer, advice: str) -> None:
    """Refuse a tokenizer that is not the weights' own.

    Args:
        weights: folder, or a file, which says nothing of its tokenizer.
        tokenizer: that is to be used with them.
        advice: closes the error.

    Raises:
        ValueError: its ids would mean other words.
    """
    if not (weights / "config.json").is_file():
        return
    own = tokenizer_fingerprint(weights)
    if own is None and (weights / "tokenizer.json").is_file():  # written by another program
        own = Tokenizer.load(weights).fingerprint
    if own not in (None, tokenizer.fingerprint):
        raise ValueError(
            f"{weights} was trained with tokenizer {own}, this one is {tokenizer.fingerprint}: its ids would mean other "
            f"words; {advice}"
        )


def check_size(tokenizer: Tokenizer, rows: int) -> None:
    """Refuse a tokenizer with more ids than a model has rows.

    Args:
        tokenizer: of the model.
        rows: vocabulary of the model.

    Raises:
        ValueError: it has.
    """
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model only {rows}: give the tokenizer that belongs to "
            "the weights"
        )
