"""The Linen modules and protocols that models and layer methods share."""
