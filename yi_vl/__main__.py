"""`python -m yi_vl` is `yi-vl`."""

import sys


def main() -> None:
    """`cli.main`, quiet also when Ctrl-C comes while it is imported."""
    try:
        from .cli import main

        main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
