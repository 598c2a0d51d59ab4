//! Dense linear algebra on faer: products, Cholesky with repair, symmetric eigenproblems.
