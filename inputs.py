"""Bad input ends a command with one clear line and exit status 2; a bug keeps its traceback."""

import sys


class BadInput(Exception):
    """What is wrong, where, and what to do about it, in one line for the person at the keyboard."""


def main_with_clear_errors(main):
    """Run a command's main(); BadInput becomes one line on stderr and exit status 2, Ctrl-C status 130."""
    try:
        main()
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
