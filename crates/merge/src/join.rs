use kintsugi_runtime::Result;
use kintsugi_weights::{ElementType, LowRank};

use crate::MergeSource;
use crate::stored_cat::beyond;

/// Updates side by side in the order that is given, terms in theirs: the exact sum, as [`crate::Cat`] gives it, but with
/// every update in its place. Where weight times scaling is 1 and the type can hold them, the factors of a part stand in
/// the result as they are. `None` without terms.
///
/// # Errors
/// `ERR_VALUE_NOT_FINITE` when the type of the factors cannot hold them.
///
/// # Panics
/// When the shapes of the parts differ.
pub fn join(name: &str, parts: &[MergeSource<'_>], factor_type: ElementType) -> Result<Option<LowRank>> {
    let rank: usize = parts.iter().map(|part| part.factors.rank()).sum();
    let Some(first) = parts.first().filter(|_| rank > 0) else { return Ok(None) };
    let (out_features, in_features) = (first.factors.out_features(), first.factors.in_features());
    let scaled = |part: &MergeSource<'_>| {
        let coefficient = part.coefficient();
        part.factors.a().iter().map(|&value| (f64::from(value) * coefficient) as f32).collect::<Vec<f32>>()
    };
    let a = parts.iter().flat_map(scaled).collect();
    let row = |i: usize, part: &MergeSource<'_>| {
        let rank = part.factors.rank();
        part.factors.b()[i * rank..(i + 1) * rank].to_vec()
    };
    let b = (0..out_features).flat_map(|i| parts.iter().flat_map(move |part| row(i, part))).collect();
    let joined = LowRank::new(out_features, in_features, rank, b, a, factor_type);
    match joined.b().iter().chain(joined.a()).all(|value| value.is_finite()) {
        true => Ok(Some(joined)),
        false => Err(beyond(name, factor_type)),
    }
}
