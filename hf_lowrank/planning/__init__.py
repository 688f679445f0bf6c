"""From a budget to a plan: what each matrix may cost, how the budget is shared, which structure each one gets."""
