"""What weight methods share: the protocol, scores, rules, rewiring, and one-shot pruning."""
