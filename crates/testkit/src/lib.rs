//! Case tables with error budgets, f64 oracles, generators of realistic and hostile matrices (tests only).
