//! CPU products chosen at run time, and the small operations of a decoder block.
