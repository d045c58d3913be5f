"""Entry point of `python -m moetool`, `accelerate launch -m moetool` and `torchrun -m moetool`."""

from moetool.cli import main

if __name__ == "__main__":
    main()
