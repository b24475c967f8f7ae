"""``python -m runtime.commands``: the same as ``babeltower``."""

from runtime.commands.app import main

if __name__ == "__main__":
    main()
