"""The `nestor` command: one thin file for each subcommand, each with a dataclass `Args` and `run(args) -> int`."""
