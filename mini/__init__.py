"""The miniature world and its models: everything runs on a laptop without a download."""
