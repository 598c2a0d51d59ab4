use std::fmt;

use fancy_regex::{Regex, RegexBuilder};
use kintsugi_runtime::Result;
use kintsugi_weights::{CODE_BITS, GroupAxis, GroupSize, QuantizedMatrix};
use serde::{Deserialize, Serialize};

use crate::config_fields::{invalid, unsupported};

/// Most steps that an expression may take over a name: expressions come from files that nobody trusts.
const BACKTRACK_LIMIT: usize = 10_000;
/// Most expressions of one configuration; names and their exact expressions do not count.
const MOST_EXPRESSIONS: usize = 1000;
/// Most bytes of the state machine of an expression.
const EXPRESSION_BYTES: usize = 2 << 20;
/// Most bytes of all state machines of one configuration, by [`estimated_bytes`].
const ALL_EXPRESSION_BYTES: usize = 64 << 20;
/// What a class of Unicode characters such as `\w` takes, about.
const CLASS_BYTES: usize = 60 << 10;

/// How the weights of a configuration, or of one matrix, are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scheme {
    /// Width of a code: 2, 3, 4, 5, 6 or 8.
    pub bits: u8,
    /// Weights that share a scale.
    pub group_size: GroupSize,
    /// Which way they lie.
    pub group_axis: GroupAxis,
    /// Whether the zero point of every group is `2^(bits−1)`.
    pub symmetric: bool,
    /// Whether columns may have groups of their own.
    pub group_index: bool,
}

/// Linears that a configuration stores in another way than the rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchemeException {
    /// Which ones.
    pub linears: LinearTarget,
    /// How.
    pub scheme: Scheme,
}

/// Names of Linears: one name, or a regular expression that matches from their start.
#[derive(Clone, Debug)]
pub struct LinearTarget {
    text: String,
    matcher: Matcher,
}

#[derive(Clone, Debug)]
enum Matcher {
    /// The text is the name.
    Name,
    /// The text is an expression that only this name matches. Configurations name thousands of Linears so.
    Exactly(String),
    Expression(Regex),
}

/// Counts the expressions of a configuration while it is read: each is a program that takes memory and time.
#[derive(Debug)]
pub(crate) struct ExpressionReader<'a> {
    field: &'a str,
    left: usize,
    left_bytes: usize,
}

impl<'a> ExpressionReader<'a> {
    /// For the expressions in `field`.
    pub(crate) fn new(field: &'a str) -> Self {
        ExpressionReader { field, left: MOST_EXPRESSIONS, left_bytes: ALL_EXPRESSION_BYTES }
    }

    /// As [`LinearTarget::expression`].
    ///
    /// # Errors
    /// `ERR_CONFIG_INVALID`, also when there are too many.
    pub(crate) fn read(&mut self, expression: &str) -> Result<LinearTarget> {
        if exact_name(expression).is_none() {
            let left = self.left.checked_sub(1);
            self.left = left.ok_or_else(|| invalid(self.field, &format!("at most {MOST_EXPRESSIONS} expressions")))?;
            let left = self.left_bytes.checked_sub(estimated_bytes(expression));
            self.left_bytes = left.ok_or_else(|| invalid(self.field, "expressions of a reasonable size together"))?;
        }
        LinearTarget::expression(expression)
    }
}

/// What the state machine of an expression takes at most, about: counted repetitions make copies.
fn estimated_bytes(expression: &str) -> usize {
    let classes = expression.matches('\\').count();
    let plain = classes.saturating_mul(CLASS_BYTES).saturating_add(expression.len().saturating_mul(256));
    if expression.contains('{') { EXPRESSION_BYTES } else { plain.min(EXPRESSION_BYTES) }
}

/// The only name that an expression matches, where it is no more than that name with dots escaped.
fn exact_name(expression: &str) -> Option<String> {
    let body = expression.strip_suffix('$')?;
    let mut name = String::new();
    let mut characters = body.strip_prefix('^').unwrap_or(body).chars();
    while let Some(character) = characters.next() {
        name.push(match character {
            '\\' => characters.next().filter(|&escaped| escaped == '.')?,
            plain if plain.is_ascii_alphanumeric() || plain == '_' || plain == '-' => plain,
            _ => return None,
        });
    }
    Some(name)
}

impl Scheme {
    /// How `matrix` is stored.
    pub fn of(matrix: &QuantizedMatrix) -> Self {
        Scheme {
            bits: matrix.bits(),
            group_size: matrix.group_size(),
            group_axis: matrix.group_axis(),
            symmetric: matrix.is_symmetric(),
            group_index: matrix.group_index().is_some(),
        }
    }

    /// Whether a matrix stored like this can be read where `config` speaks of `stated`: a Linear whose columns are in
    /// order needs no index where others have one.
    pub(crate) fn fits(self, stated: Scheme) -> bool {
        self == stated || (stated.group_index && Scheme { group_index: true, ..self } == stated)
    }

    /// `bits` and `group_size` as configurations write them: −1 is one group per row.
    ///
    /// # Errors
    /// `ERR_QUANTIZATION_UNSUPPORTED` for other widths, `ERR_CONFIG_INVALID` for sizes that are no size.
    pub(crate) fn grid(bits: i64, size: i64) -> Result<(u8, GroupSize)> {
        let group_size = match usize::try_from(size) {
            Ok(size) if size > 0 => GroupSize::Columns(size),
            _ if size == -1 => GroupSize::WholeRow,
            _ => return Err(invalid("group_size", "a positive number")),
        };
        Ok((Self::width(bits, "bits")?, group_size))
    }

    /// A code width that is known.
    ///
    /// # Errors
    /// `ERR_QUANTIZATION_UNSUPPORTED`.
    pub(crate) fn width(bits: i64, field: &str) -> Result<u8> {
        let known = u8::try_from(bits).ok().filter(|bits| CODE_BITS.contains(bits));
        known.ok_or_else(|| unsupported(field, &bits.to_string()))
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let grid = if self.symmetric { "symmetric" } else { "asymmetric" };
        match self.group_size {
            GroupSize::Columns(size) => write!(f, "{} bits, {grid}, groups of {size}", self.bits)?,
            GroupSize::WholeRow => write!(f, "{} bits, {grid}, one group per row", self.bits)?,
        }
        f.write_str(if self.group_axis == GroupAxis::Output { " along the outputs" } else { "" })?;
        f.write_str(if self.group_index { ", with group index" } else { "" })
    }
}

/// The `group_size` that configurations write: −1 for one group per row.
pub(crate) fn group_size_number(group_size: GroupSize) -> i64 {
    match group_size {
        GroupSize::Columns(size) => i64::try_from(size).unwrap_or(i64::MAX),
        GroupSize::WholeRow => -1,
    }
}

impl LinearTarget {
    /// The Linear of that name.
    pub fn name(name: impl Into<String>) -> Self {
        LinearTarget { text: name.into(), matcher: Matcher::Name }
    }

    /// The Linears whose names an expression matches from their start, as Python's `re.match` does.
    ///
    /// # Errors
    /// `ERR_CONFIG_INVALID` for what is no expression.
    pub fn expression(expression: &str) -> Result<Self> {
        let compiled = || {
            RegexBuilder::new(&format!("^(?:{expression})"))
                .backtrack_limit(BACKTRACK_LIMIT)
                .delegate_size_limit(EXPRESSION_BYTES)
                .build()
                .map_err(|_| invalid(expression, "a regular expression of a reasonable size"))
        };
        let matcher = match exact_name(expression) {
            Some(name) => Matcher::Exactly(name),
            None => Matcher::Expression(compiled()?),
        };
        Ok(LinearTarget { text: expression.to_owned(), matcher })
    }

    /// The name or the expression.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether it is an expression.
    pub fn is_expression(&self) -> bool {
        !matches!(self.matcher, Matcher::Name)
    }

    /// Whether the Linear of that name is meant.
    pub fn matches(&self, name: &str) -> bool {
        match &self.matcher {
            Matcher::Name => self.text == name,
            Matcher::Exactly(only) => only == name,
            // One that runs away does not match.
            Matcher::Expression(expression) => expression.is_match(name).unwrap_or(false),
        }
    }

    /// An expression that matches the same names.
    pub(crate) fn to_expression(&self) -> String {
        match &self.matcher {
            Matcher::Name => format!("^{}$", self.text.replace('.', r"\.")),
            Matcher::Exactly(_) | Matcher::Expression(_) => self.text.clone(),
        }
    }
}

impl PartialEq for LinearTarget {
    fn eq(&self, other: &Self) -> bool {
        (&self.text, self.is_expression()) == (&other.text, other.is_expression())
    }
}

impl Eq for LinearTarget {}

#[cfg(test)]
mod tests {
    use kintsugi_runtime::ErrorCode;

    use super::*;

    #[test]
    fn names_and_expressions_match_as_in_python() {
        let name = LinearTarget::name("model.layers.1.mlp.up_proj");
        assert!(name.matches("model.layers.1.mlp.up_proj") && !name.matches("model.layers.11.mlp.up_proj"));
        for (expression, linear, expected) in [
            (r".*self_attn.*", "model.layers.0.self_attn.q_proj", true),
            (r"self_attn", "model.layers.0.self_attn.q_proj", false),
            (r"model\.layers\.[0-3]\.", "model.layers.3.mlp.up_proj", true),
            (r"model\.layers\.[0-3]\.", "model.layers.31.mlp.up_proj", false),
            (r"(?!.*lm_head).*proj$", "model.layers.3.mlp.up_proj", true),
            (r"a|model.*down", "model.layers.3.mlp.down_proj", true),
        ] {
            let target = LinearTarget::expression(expression).unwrap();
            assert_eq!(target.matches(linear), expected, "{expression} on {linear}");
        }
        let escaped = LinearTarget::expression(&name.to_expression()).unwrap();
        assert!(escaped.matches("model.layers.1.mlp.up_proj") && !escaped.matches("model.layers.1xmlp.up_proj"));
    }

    #[test]
    fn expressions_of_one_name_need_no_program() {
        for (expression, name) in [(r"^a\.b-1_c$", Some("a.b-1_c")), (r"a\.b$", Some("a.b")), ("^$", Some(""))] {
            assert_eq!(exact_name(expression).as_deref(), name);
        }
        for expression in ["a.b$", r"^a\.b", "a|b$", r"\d$", r"a\\$", "^a$$", "a$b$", "é$"] {
            assert_eq!(exact_name(expression), None, "{expression}");
        }
        let target = LinearTarget::expression(r"^a\.b$").unwrap();
        assert!(target.is_expression() && target.matches("a.b") && !target.matches("axb") && !target.matches("a.bc"));
        let mut reader = ExpressionReader::new("dynamic");
        for _ in 0..MOST_EXPRESSIONS {
            reader.read(r"^a\.b$").unwrap();
            reader.read("a").unwrap();
        }
        reader.read(r"^a\.b$").unwrap();
        assert_eq!(reader.read("a").unwrap_err().code, ErrorCode::ConfigInvalid);
    }

    #[test]
    fn hostile_expressions_end() {
        let large = LinearTarget::expression(r"((\w{100}){100}){100}").unwrap_err();
        assert_eq!(large.code, ErrorCode::ConfigInvalid);
        let runaway = LinearTarget::expression(r"(?=(a+)+$)\1b").unwrap();
        assert!(!runaway.matches(&"a".repeat(40)));
        assert_eq!(LinearTarget::expression("(").unwrap_err().code, ErrorCode::ConfigInvalid);
    }
}
