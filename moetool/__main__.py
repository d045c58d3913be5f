"""Entry point of `moetool`, `python -m moetool`, `accelerate launch -m moetool` and `torchrun -m moetool`."""

import sys


def main() -> None:
    """Run the process's command line and exit; Ctrl-C has its exit code from the first moment on."""
    try:
        from moetool import cli
    except KeyboardInterrupt:
        print("moetool: interrupted", file=sys.stderr)
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
