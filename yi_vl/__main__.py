"""`python -m yi_vl` is `yi-vl`."""

from .cli import main

main()
