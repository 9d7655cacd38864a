"""`minimind-fast <command>`: finds the command's module, runs it, and reports errors in one line.

Purpose: one entry point.
Principle: a table from command to `module:function`; only the chosen command's module is imported. The function takes
    the arguments after the command and returns the exit code. To add a command: one line in COMMANDS.
Properties: exit code 0 on success, 1 if a check failed, 2 for wrong usage or input, 130 after Ctrl-C. A user's mistake
    is one line, not a traceback (MINIMIND_DEBUG=1 shows the traceback).
"""

from __future__ import annotations

import importlib
import os
import sys

from minimind_fast.console import any_text_may_be_printed
from minimind_fast.errors import UserError

COMMANDS = {
    "train": ("minimind_fast.commands.train:main", "run a training stage, or list the stages"),
    "chat": ("minimind_fast.commands.chat:main", "talk to a model in the terminal, or pipe one question in"),
    "generate": ("minimind_fast.commands.chat:generate_main", "continue texts"),
    "eval": ("minimind_fast.commands.evaluate:main", "sample answers, perplexity, multiple-choice accuracy"),
    "export": (
        "minimind_fast.commands.convert:main_export",
        "write a model for Transformers and the tools that read its folders",
    ),
    "import": ("minimind_fast.commands.convert:main_import", "bring a Hugging Face folder or a MiniMind .pth in"),
    "lora": ("minimind_fast.commands.convert:main_lora", "merge adapters into a model, or change their format"),
    "plan": (
        "minimind_fast.commands.plan:main",
        "what a run needs: memory, step time, hours and cost, on 1 to 1,024 GPUs",
    ),
    "serve": ("minimind_fast.commands.serve:main", "an OpenAI-compatible server and a chat page"),
    "verify": ("minimind_fast.commands.verify:main", "check every kernel against the reference, and whole models"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the command and its arguments; sys.argv's if None.

    Returns:
        The exit code.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print("usage: minimind-fast <command> [options]\n")
        for name, (_, text) in COMMANDS.items():
            print(f"  {name:10} {text}")
        print("\nminimind-fast <command> --help shows a command's options.")
        return 0
    if argv[0] in ("-V", "--version"):
        from minimind_fast import __version__

        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        print(f"error: unknown command {argv[0]!r}; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module, function = COMMANDS[argv[0]][0].split(":")
    any_text_may_be_printed()
    try:
        return getattr(importlib.import_module(module), function)(argv[1:])
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads our output has gone: exit quietly
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as error:
        if os.environ.get("MINIMIND_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
