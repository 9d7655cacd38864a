"""Matching weights with their tokenizer.

Purpose: `tokenizer_of` finds the tokenizer of weights, `check_match` refuses a wrong one. Training, the commands and
    distillation all use these.
Principle: our weights record the fingerprint of their tokenizer; for other folders it is that of the tokenizer.json
    inside.
Properties: ids never silently change their meaning.
"""

from __future__ import annotations

from pathlib import Path

from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.errors import UserError
from minimind_fast.weights.checkpoint import check_exists, tokenizer_fingerprint


def tokenizer_of(weights: Path | None, given: str | Path | None, option: str, default: Path | None = None) -> Tokenizer:
    """The given tokenizer, else that of the weights, else the default.

    Args:
        weights: folder or file, or None for a new model.
        given: a tokenizer's folder, if the user gave one.
        option: the option for `given`, such as "--tokenizer_path", to name in errors.
        default: a new model's tokenizer.

    Raises:
        ValueError: no tokenizer is found, or it cannot be read.
    """
    if given:
        return Tokenizer.load(given)
    if weights is None:
        if default is None:
            raise UserError(f"give {option}, a folder with tokenizer.json")
        return Tokenizer.load(default)
    check_exists(weights)
    if not (weights / "tokenizer.json").is_file():
        raise UserError(f"{weights} has no tokenizer with it: give {option}, the folder that it was trained with")
    return Tokenizer.load(weights)


def check_match(weights: Path, tokenizer: Tokenizer, advice: str) -> None:
    """Refuse a tokenizer that is not the weights' own.

    Args:
        weights: folder, or a file, which records no tokenizer and matches any.
        tokenizer: the one to use with them.
        advice: end of the error message.

    Raises:
        ValueError: the fingerprints differ.
    """
    if not (weights / "config.json").is_file():
        return
    own = tokenizer_fingerprint(weights)
    if own is None and (weights / "tokenizer.json").is_file():  # written by another program
        own = Tokenizer.load(weights).fingerprint
    if own not in (None, tokenizer.fingerprint):
        raise UserError(
            f"{weights} was trained with tokenizer {own}, this one is {tokenizer.fingerprint}: its ids would mean other "
            f"words; {advice}"
        )


def check_size(tokenizer: Tokenizer, rows: int) -> None:
    """Refuse a tokenizer with more ids than the model's embedding has rows.

    Raises:
        ValueError: too many ids.
    """
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model only {rows}: give the tokenizer that belongs to "
            "the weights"
        )
