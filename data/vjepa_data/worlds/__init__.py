"""Small worlds with actions: simulated in NumPy, many episodes at once, and written as videos with signals."""
