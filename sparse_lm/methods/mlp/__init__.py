"""MLP methods: experts, gates, and predictors of active neurons."""
