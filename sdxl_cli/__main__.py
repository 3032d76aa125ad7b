"""``python -m sdxl_cli`` is ``sdxl``."""

from sdxl_cli.cli import main

main()
