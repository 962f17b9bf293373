"""Runs: everything that writes or reads a run folder. An evaluation or an attack stops anywhere and resumes."""
