"""The report: one self-contained page about a trace and the plans for it."""
