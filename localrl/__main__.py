"""`python -m localrl` is `localrl`."""

from localrl.cli import main

main()
