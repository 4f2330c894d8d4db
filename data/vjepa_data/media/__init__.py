"""Fetch, probe, analyze, encode and check untrusted files in a child process that may be killed."""
