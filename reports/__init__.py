"""One HTML template, plots and tables. Modules and steps contribute sections; a callback makes the page."""

from fulgurite.reports.page import ReportSource, Section, render_page

__all__ = ["ReportSource", "Section", "render_page"]
