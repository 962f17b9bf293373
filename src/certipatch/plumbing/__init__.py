"""Helpers that any room may use: parsing, files, resources, devices, processes. They import none of the rooms."""
