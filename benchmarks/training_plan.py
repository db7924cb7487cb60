"""Tables of docs/training-at-size.md: training the full-size model, by arithmetic. No GPU and no weights are needed.

python benchmarks/training_plan.py
"""

from ki_edge.commands import show
from ki_edge.planning.plan import assumptions, bytes_table, device_table, scale_table


def main() -> None:
    """Print the tables as Markdown."""
    for part in (bytes_table(), device_table(), scale_table(), assumptions()):
        show([*part, ""])


if __name__ == "__main__":
    main()
