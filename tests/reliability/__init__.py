"""What happens when things go wrong: files, kills, calls, memory."""
