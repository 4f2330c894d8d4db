"""Fetch, probe, analyze, encode and check one untrusted file at a time, in a child process that may be killed."""
