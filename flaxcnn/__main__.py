"""`python -m flaxcnn COMMAND`: files or names in, answers out."""

import argparse
import os
import sys
from collections.abc import Sequence

from flaxcnn.commands import convert, models, plot, predict, scaling, stack, summary
from flaxcnn.errors import InputError

COMMANDS = (models, summary, stack, scaling, plot, predict, convert)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 2 for wrong input, told in one line."""
    parser = argparse.ArgumentParser(prog="python -m flaxcnn", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    asked = parser.parse_args(arguments)
    try:
        code = int(asked.run(asked))
        if sys.stdout is not None:  # as it is where standard output is closed
            sys.stdout.flush()
    except InputError as error:
        print(f"python -m flaxcnn: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's last flush
        return 1
    except OSError as error:  # a full disk, say
        print(f"python -m flaxcnn: {error.strerror or error}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
