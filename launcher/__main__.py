"""`flux2-ds` and `python -m launcher`."""

import os
import signal
import sys


def main() -> None:
    """Run a command; Ctrl-C is one line and a shell's code 130, also while modules are imported."""
    try:
        _check_environment()
        from launcher import cli

        cli.main()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


def _check_environment() -> None:
    """huggingface_hub reads its variables while it is imported; its own error would show a part of a password."""
    try:
        from huggingface_hub import file_download  # noqa: F401
    except ValueError:
        names = ", ".join(sorted(name for name in os.environ if name.startswith("HF_")))
        sys.stderr.write(
            f"error: huggingface_hub cannot read one of these environment variables: {names}. Correct or unset it.\n"
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
