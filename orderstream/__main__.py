"""``python -m orderstream``: the command line."""

from orderstream.cli import main

if __name__ == "__main__":
    main()
