"""The report page of a program: numbers (data.py), words (sections.py, words.py), drawings (page/), one HTML file."""

from bstf_compiler.aie.report.data import Panel, gammas_of
from bstf_compiler.aie.report.page import Section, write_report

__all__ = ["Panel", "Section", "gammas_of", "write_report"]
