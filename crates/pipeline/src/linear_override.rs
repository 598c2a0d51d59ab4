use kintsugi_runtime::{Error, ErrorCode, Result};
use kintsugi_weights::GroupSize;
use serde::Serialize;

/// Options of some Linears that differ from those of the rest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LinearOverride {
    /// Their names; `*` stands for any characters: `*.down_proj`, `model.layers.0.*`.
    pub linears: String,
    /// Width of a code, where it differs.
    pub bits: Option<u8>,
    /// Columns that share a scale, where it differs: 0 for the whole row.
    pub group_size: Option<usize>,
}

impl LinearOverride {
    /// Whether the Linear of that name is meant.
    pub fn matches(&self, name: &str) -> bool {
        let mut pieces = self.linears.split('*');
        let first = pieces.next().unwrap_or_default();
        let Some(mut rest) = name.strip_prefix(first) else { return false };
        let mut pieces: Vec<&str> = pieces.collect();
        let Some(last) = pieces.pop() else { return rest.is_empty() };
        for piece in pieces {
            let Some(at) = rest.find(piece) else { return false };
            rest = &rest[at + piece.len()..];
        }
        rest.ends_with(last)
    }

    /// Columns that share a scale, where they differ.
    pub fn group_size(&self) -> Option<GroupSize> {
        self.group_size.map(|size| if size == 0 { GroupSize::WholeRow } else { GroupSize::Columns(size) })
    }

    /// Refuses an override that matches none of `names`.
    ///
    /// # Errors
    /// `ERR_OPTION_INVALID`.
    pub(crate) fn check_used(&self, names: &[String]) -> Result<()> {
        if names.iter().any(|name| self.matches(name)) {
            return Ok(());
        }
        let example = names.first().map(String::as_str).unwrap_or_default();
        Err(Error::new(ErrorCode::OptionInvalid, format!("no Linear is named {:?}", self.linears))
            .subject("overrides")
            .hint(format!("Linears have names such as {example:?}; * stands for any characters")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_stand_for_any_characters() {
        for (linears, name, expected) in [
            ("*.down_proj", "model.layers.0.mlp.down_proj", true),
            ("*.down_proj", "model.layers.0.mlp.down_proj.inner", false),
            ("model.layers.1.*", "model.layers.1.mlp.up_proj", true),
            ("model.layers.1.*", "model.layers.11.mlp.up_proj", false),
            ("*.layers.*.v_proj", "model.layers.3.self_attn.v_proj", true),
            ("*a*a*", "ba", false),
            ("*a*a*", "aba", true),
            ("lm_head", "lm_head", true),
            ("lm_head", "lm_head2", false),
            ("*", "", true),
            ("", "x", false),
            ("ab*ba", "aba", false),
        ] {
            let given = LinearOverride { linears: linears.into(), bits: None, group_size: None };
            assert_eq!(given.matches(name), expected, "{linears} on {name}");
        }
    }

    #[test]
    fn overrides_of_nothing_are_named() {
        let given = LinearOverride { linears: "*.dwon_proj".into(), bits: Some(8), group_size: None };
        let error = given.check_used(&["model.layers.0.mlp.down_proj".into()]).unwrap_err();
        assert_eq!((error.code, error.subject.as_str()), (ErrorCode::OptionInvalid, "overrides"));
        assert!(error.message.contains("dwon") && error.hint.contains("mlp.down_proj"));
    }
}
