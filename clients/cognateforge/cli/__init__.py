"""The `forge` command."""


def main() -> None:
    """Run the command line. What a command needs is imported when it runs, so that `forge --help` is quick."""
    from cognateforge.cli.terminal import open_missing_streams

    open_missing_streams()
    from cognateforge.cli.app import app

    app()
