"""The `specsamp` command."""
