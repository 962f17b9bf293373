"""Helpers that any room may use: parsing, files, resources, versions, devices, processes. They import none of the rooms."""
