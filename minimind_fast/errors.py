"""What a user can mend: the one class of error that becomes a sentence.

Purpose: `UserError` for a wrong option, file or folder; `DataError` for wrong data.
Principle: a program that ends with one of these prints its message alone. Any other exception keeps its traceback, because
    it is a fault of ours or of a library, and its message was not written for the user.
Properties: subclasses of ValueError, so that callers from Python need not know them. Imports nothing.
"""


class UserError(ValueError):
    """Something that the user can mend; the message says what is wrong and what to do."""


class DataError(UserError):
    """Something is wrong with the user's data; the message names the file, the line and the fault."""


class TrainingStopped(RuntimeError):
    """The run cannot continue; the message says why and what to do."""
