"""``python -m gossamer``: the command line, for launchers of several processes."""

from gossamer.cli import main

if __name__ == "__main__":
    main()
