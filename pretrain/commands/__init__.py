"""The subcommands, a file for each group: options in, exit status out. No torch at import."""
