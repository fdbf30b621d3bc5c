"""Models side by side: the same prompts, the same seeds, the run's own rewards, through llama.cpp.

    entries.py   what is compared: base, checkpoints, files, other runs      rows.py    answers, rewards, means
    run.py       the whole way, from a run folder                            table.py   for the terminal        page.py   for a browser
"""

from localrl.comparison.entries import Entry
from localrl.comparison.page import page
from localrl.comparison.rows import Answer, Comparison, Mean, Row, Summary, compare
from localrl.comparison.run import compare_run
from localrl.comparison.table import comparison_table, summary_table

__all__ = ["Answer", "Comparison", "Entry", "Mean", "Row", "Summary", "compare", "compare_run", "comparison_table", "page", "summary_table"]
