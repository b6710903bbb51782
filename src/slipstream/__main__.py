"""`python -m slipstream`, which is how torchrun starts the program."""

from slipstream.cli.main import main

if __name__ == "__main__":
    main()
