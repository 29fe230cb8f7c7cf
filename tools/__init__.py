"""Things beside the method."""
