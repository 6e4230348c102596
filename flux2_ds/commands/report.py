"""Write what a run did, as one HTML page that a person opens.

flux2-ds report --run DIR                  writes DIR/report.html
flux2-ds report --compare DIR DIR ...      several runs beside each other, into comparison.html
"""

from __future__ import annotations

from pathlib import Path

from flux2_ds.errors import Arguments, UserError, run_root
from flux2_ds.run.report import REPORT_NAME, write_page


def main() -> None:
    """Entry point of `flux2-ds report`."""
    parser = Arguments("flux2-ds report", description="Write a page about a run.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, metavar="DIR", help="run directory")
    which.add_argument("--compare", type=Path, nargs="+", metavar="DIR", help="run directories")
    parser.add_argument("--output", type=Path, help="default: DIR/report.html, or comparison.html")
    options = parser.parse_args()
    if options.compare and len(options.compare) < 2:
        raise UserError(f"--compare {options.compare[0]}: name two runs or more, or use --run.")
    default = options.run / REPORT_NAME if options.run else Path("comparison.html")
    path = options.output or default
    try:
        print(write_page(options.compare or [options.run], path))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}).") from error


if __name__ == "__main__":
    run_root(main)
