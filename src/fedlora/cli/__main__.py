"""The `fedlora` command as `python -m fedlora.cli`."""

from fedlora.cli.main import main

main()
