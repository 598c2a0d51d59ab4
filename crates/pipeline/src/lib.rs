//! The long jobs: walk a checkpoint block by block, calibrate, compress, compensate, write, report.
