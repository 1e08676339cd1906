"""The program ``fxzip``, also as ``python -m fxzip``."""

from fxzip.stopping import end_on_interrupt

end_on_interrupt()  # before anything heavy is imported


def main() -> None:
    """Run the command line."""
    from fxzip.cli import app

    app()


if __name__ == "__main__":
    main()
