"""One stranger's file at a time, fetched, probed, looked at, encoded and checked, in a child that may be killed."""
