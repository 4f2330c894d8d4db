"""The engine trains any method: loop, attempt, optimizer, schedule, resume, roll-back, stop signals."""
