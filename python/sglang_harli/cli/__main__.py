"""``python -m sglang_harli.cli``."""

from sglang_harli.cli.main import main

if __name__ == "__main__":
    main()
