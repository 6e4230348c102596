"""`flux2-ds` and `python -m launcher`."""

import os
import signal
import sys


def main() -> None:
    """Run a command; Ctrl-C is one line and a shell's code 130, also while modules are imported."""
    try:
        from launcher import cli

        cli.main()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    main()
