//! The Node binding: Binding types and conversions only.
