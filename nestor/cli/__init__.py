"""The `nestor` command: one thin file a subcommand, each with a dataclass `Args` and `run(args) -> int`."""
