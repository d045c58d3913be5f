"""Entry point of `moetool`, `python -m moetool`, `accelerate launch -m moetool` and `torchrun -m moetool`."""

import gc
import sys


def main() -> None:
    """Run the process's command line and exit; Ctrl-C has its exit code from the first moment on."""
    # torch and transformers are made of a million objects that stay. Searching them for garbage while they are imported
    # takes as long as the rest of their import; a command's Console turns the search on again.
    gc.disable()
    try:
        from moetool import cli
    except KeyboardInterrupt:
        print("moetool: interrupted", file=sys.stderr)
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
