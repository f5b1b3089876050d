"""`python -m finetune.cli`, as it was called before the commands were a package."""

from finetune.cli import main

if __name__ == "__main__":
    main()
