"""The command line. `main` holds the program, `options` what commands share, and each command has a file.

Only typer is imported to start; torch, tokenizers and the rest come when a command needs them.
"""
