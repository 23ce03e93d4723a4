"""The command `bitdance`: one file per subcommand. Nothing heavy is imported before the arguments are parsed."""
