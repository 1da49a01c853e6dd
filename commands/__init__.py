"""What the command line does: a module per command, each with ``run(command, argv) -> exit code``."""
