"""Finished runs side by side: paired differences, tables, figures, a page."""
