"""Width: passes that remove heads, KV groups, neurons and hidden dimensions."""
