"""A file per subcommand: flags to a request, one call, print the result."""
