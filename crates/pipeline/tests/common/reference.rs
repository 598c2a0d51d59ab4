//! One row of the published figures, measured.

use std::path::Path;

use kintsugi_pipeline::{Report, compress};
use kintsugi_runtime::{CancelToken, Progress};
use kintsugi_testkit::reference_rows::ReferenceRow;

use super::{backend, perplexity, recipe};

/// What came out.
pub(crate) struct Measured {
    pub(crate) perplexity: f64,
    pub(crate) report: Report,
}

/// Compresses `source` by `row` into a folder of `scratch`, loads what was written and measures it.
pub(crate) fn measure(source: &Path, scratch: &Path, row: &ReferenceRow) -> Measured {
    let out = scratch.join(format!("{}-{}-{}", row.method, row.bits, row.rank));
    let recipe = recipe(source, &out, row.method, row.bits, row.rank);
    let report = compress(&recipe, &backend(), &CancelToken::new(), &Progress::new()).unwrap();
    let perplexity = perplexity(&out, "eval-wikitext.txt", 256);
    std::fs::remove_dir_all(&out).unwrap();
    Measured { perplexity, report }
}
