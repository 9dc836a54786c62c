"""Stage two's training: losses, schedules, optimiser and the loop that uses them."""
