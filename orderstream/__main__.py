"""``python -m orderstream``: the command line."""

from orderstream.jobs.cli.main import main

if __name__ == "__main__":
    main()
