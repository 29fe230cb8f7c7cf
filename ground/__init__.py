"""What everybody may use and what uses nobody."""
