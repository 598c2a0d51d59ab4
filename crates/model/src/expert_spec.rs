use kintsugi_runtime::Result;

use crate::config_fields::{Fields, invalid, unsupported};
use crate::{ExpertRule, LinearSlot, LinearSpec};

/// The experts of each block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertSpec {
    /// Experts of a block.
    pub count: usize,
    /// Experts that a token goes through.
    pub per_token: usize,
    /// Width of an expert.
    pub width: usize,
    /// Whether the shares of the chosen experts add up to one.
    pub normalized: bool,
}

/// The rows of a batch that go through one expert, and with which share.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Route {
    pub(crate) rows: Vec<usize>,
    pub(crate) shares: Vec<f32>,
}

impl ExpertSpec {
    /// Reads what `rule` names.
    ///
    /// # Errors
    /// `ERR_CONFIG_INVALID` for missing or impossible fields, `ERR_CONFIG_UNSUPPORTED` when some blocks have no
    /// experts.
    pub(crate) fn read(rule: &ExpertRule, fields: Fields<'_>) -> Result<Self> {
        if fields.optional_size("decoder_sparse_step")?.is_some_and(|step| step != 1) {
            return Err(unsupported("decoder_sparse_step", "experts in some blocks only".into()));
        }
        if fields.value("mlp_only_layers").and_then(serde_json::Value::as_array).is_some_and(|list| !list.is_empty()) {
            return Err(unsupported("mlp_only_layers", "experts in some blocks only".into()));
        }
        let [first, second] = rule.count;
        let count = match fields.optional_size(second)? {
            Some(count) if fields.value(first).is_none() => count,
            _ => fields.size(first)?,
        };
        let per_token = fields.size("num_experts_per_tok")?;
        if count > usize::from(u16::MAX) {
            return Err(invalid(first, format!("{count} experts are more than {}", u16::MAX)));
        }
        if per_token > count {
            return Err(invalid("num_experts_per_tok", format!("{per_token} is more than the {count} experts")));
        }
        let normalized = rule.normalized.is_none_or(|flag| fields.flag(flag).unwrap_or(false));
        Ok(ExpertSpec { count, per_token, width: fields.size(rule.width)?, normalized })
    }

    /// The Linears of all experts of a block.
    pub(crate) fn linears(&self, rule: &ExpertRule, hidden: usize) -> Vec<LinearSpec> {
        let kinds: [fn(u16) -> LinearSlot; 3] = [LinearSlot::ExpertGate, LinearSlot::ExpertUp, LinearSlot::ExpertDown];
        let shapes = [(self.width, hidden), (self.width, hidden), (hidden, self.width)];
        let of_expert = |expert: u16| {
            kinds.iter().zip(rule.names).zip(shapes).map(move |((slot, name), (rows, columns))| LinearSpec {
                slot: slot(expert),
                name: format!("{}.{expert}.{name}", rule.experts),
                rows,
                columns,
                bias: false,
            })
        };
        (0..self.count as u16).flat_map(of_expert).collect()
    }

    /// Where rows go whose router gave `logits`, `[rows, count]`: to the experts with the largest, the first of equal
    /// ones, with the shares that softmax gives them. One route for each expert.
    pub(crate) fn route(&self, logits: &[f32]) -> Vec<Route> {
        let mut routes = vec![Route::default(); self.count];
        for (row, logits) in logits.chunks_exact(self.count).enumerate() {
            let mut order: Vec<usize> = (0..self.count).collect();
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
            let largest = f64::from(logits[order[0]]);
            let weight = |expert: usize| (f64::from(logits[expert]) - largest).exp();
            let chosen = &order[..self.per_token];
            let over = if self.normalized { chosen } else { &order };
            let total: f64 = over.iter().map(|&expert| weight(expert)).sum();
            for &expert in chosen {
                routes[expert].rows.push(row);
                routes[expert].shares.push((weight(expert) / total) as f32);
            }
        }
        routes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_go_to_the_largest_logits_with_their_shares() {
        let mut spec = ExpertSpec { count: 3, per_token: 2, width: 8, normalized: false };
        let two = 2f32.ln();
        let routes = spec.route(&[0.0, two, 0.0, 1e30, 0.0, -1e30]);
        assert_eq!(routes[0], Route { rows: vec![0, 1], shares: vec![0.25, 1.0] }, "the first of equal ones");
        assert_eq!(routes[1], Route { rows: vec![0, 1], shares: vec![0.5, 0.0] });
        assert_eq!(routes[2], Route::default());
        spec.normalized = true;
        assert!((spec.route(&[0.0, two, 0.0])[1].shares[0] - 2.0 / 3.0).abs() < 1e-7);
        assert_eq!(spec.route(&[]), vec![Route::default(); 3]);
        let broken = spec.route(&[f32::NAN, 0.0, 0.0]);
        assert_eq!(broken.iter().map(|route| route.rows.len()).sum::<usize>(), 2);
    }
}
