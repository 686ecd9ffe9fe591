"""The shipped training configurations, one TOML file each."""
