"""Files in, arrays out."""
