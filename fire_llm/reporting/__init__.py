"""Compare the arms of a run and show them: tables, figures, the page."""
